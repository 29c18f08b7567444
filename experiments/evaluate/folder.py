"""The folder of an evaluation: its files, how it is continued, and which weights drew its samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.files import free_folder, output_path
from upge.errors import ConfigError
from upge.evaluation import SampleFile
from upge.evaluation.scores import NONE, same_answer
from upge.train.files import is_empty, locked, read_json, read_tree, write_atomically

#: Keys that may differ between an evaluation and its continuation: no sample or verdict depends on them.
ENGINE_KEYS = ("rollout.memory_fraction", "rollout.max_sequences", "rollout.max_batched_tokens")
FREE_KEYS = ("output", "resume", *ENGINE_KEYS, "verify.workers", "suite.skip")
#: What to do about a file that cannot be read.
_FIX = "restore the file that the evaluation wrote, or give another output"


class EvaluationFolder:
    """The folder `path` with config.yaml, run.json, scores.json and samples/BENCHMARK.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, config: Mapping[str, Any], resume: str) -> bool:
        """Check that this evaluation may write here; True if it continues another. Nothing is written.

        Raises:
            ConfigError: the folder cannot be made, holds something else or an evaluation with other settings, or has
                samples of a benchmark that is now skipped.
        """
        existing = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(f"output: {self.path} cannot be made: {existing} is not a folder or not writable")
        if is_empty(self.path):
            return False
        saved = self.path / "config.yaml"
        old = read_tree(saved, _FIX) if saved.is_file() else {}
        _ = self._metadata()  # raises now, not at the start, if it cannot be read
        if "suite" not in old:
            raise ConfigError(f"output: {self.path} exists and is not an evaluation's folder; choose another")
        if resume == "never":
            raise ConfigError(f"output: {self.path} exists; choose another, remove it, or continue it with resume=auto")
        new, old = _leaves(config), _leaves(old)
        different = [k for k in {**new, **old} if new.get(k) != old.get(k)]
        different = [k for k in different if not any(f"{k}.".startswith(f"{free}.") for free in FREE_KEYS)]
        if different:
            name, *others = different
            more = f" (and {len(others)} more: {', '.join(others)})" if others else ""
            raise ConfigError(
                f"{name}: {new.get(name)!r} here, but {old.get(name)!r} in the evaluation in {self.path}{more}; give "
                "the same settings to continue it, or another output"
            )
        for name in config["suite"]["skip"]:
            path = self.samples(name).path
            if path.is_file() and path.stat().st_size:
                raise ConfigError(
                    f"suite.skip: {name} has samples in {self.path} and would be missing from its scores; leave it out "
                    "of suite.skip (experiments.compare takes what runs have in common), or give another output"
                )
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder in the block, so that no other evaluation writes there.

        Raises:
            ConfigError: another evaluation holds the lock.
        """
        refusal = f"output: another evaluation is using {self.path}; wait for it, stop it, or choose another folder"
        with locked(self.path, refusal, tidy=True):
            yield

    def check_weights(self, weights: dict[str, str], model: str) -> None:
        """Check that the weights (`fingerprint`) are those that drew the samples in the folder.

        Raises:
            ConfigError: they are not; the message names the first file, or the hub's commit, that differs.
        """
        changed = difference(weights, self._metadata().get("weights", {}))
        # Without samples nothing can be mixed.
        if changed and any(path.stat().st_size for path in (self.path / "samples").glob("*.jsonl")):
            raise ConfigError(
                f"model: {model} no longer holds the weights that drew the samples in {self.path}: {changed}; give "
                "another output, or the weights that it was begun with"
            )

    def start(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[str]:
        """Write the settings and the metadata about this start; earlier starts stay listed.

        A start that samples nothing has no `engine`. It is only listed, because the rest describes the samples.

        Returns:
            The other engines that earlier starts sampled with.

        Raises:
            ConfigError: the folder cannot be made.
        """
        try:
            (self.path / "samples").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output: {self.path} cannot be made: {error.strerror}; choose another folder") from error
        write_atomically(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        old = self._metadata()
        earlier = old.get("starts", [])
        start = {key: metadata[key] for key in ("command", "started", "engine")}
        self._write("run.json", {**old, **(metadata if metadata["engine"] else {}), "starts": [*earlier, start]})
        engines = {old.get("engine"), *(one.get("engine") for one in earlier)}
        return sorted(engines - {None, metadata["engine"]})

    def samples(self, benchmark: str) -> SampleFile:
        """The file with a benchmark's samples; it need not exist yet."""
        return SampleFile(self.path / "samples" / f"{benchmark}.jsonl")

    def finish(self, scores: Mapping[str, Any]) -> None:
        """Write scores.json."""
        self._write("scores.json", scores)

    def _metadata(self) -> dict[str, Any]:
        return read_json(self.path / "run.json", _FIX)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def output_folder(output: str, model: str, suite: str) -> Path:
    """`output`, or the next free evals/MODEL-SUITE; for a run's model, MODEL includes the run's name."""
    if output:
        return output_path(output)
    place, name = Path(model).expanduser().absolute(), Path(model).name.removesuffix(".gguf")
    if (place.parent / "run.json").is_file():
        name = f"{place.parent.name}-{place.name}"
    return free_folder("evals", f"{name or place.name}-{Path(suite).stem}")


def _leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted key → value of every leaf; empty mappings are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{path}{name}"
        if isinstance(value, Mapping) and value:
            leaves |= _leaves(value, f"{dotted}.")
        else:
            leaves[dotted] = list(value) if isinstance(value, tuple) else value
    return leaves


def answer_notes(scores: Mapping[str, Any]) -> list[str]:
    """Notes on benchmarks with failed verdicts, or in which most responses give the same answer.

    scores.json of earlier versions lacks the number of equal answers.
    """
    benchmarks = scores["benchmarks"].items()
    sentences = [(name, _failed(name, one)) for name, one in benchmarks]
    sentences += [(name, same_answer(one.get("commonest", NONE), one["problems"])) for name, one in benchmarks]
    return [f"{name}: {sentence}" for name, sentence in sentences if sentence]


def _failed(name: str, one: Mapping[str, Any]) -> str:
    """A sentence on the responses of a benchmark whose verification failed; empty if there are none."""
    if not one["errors"] + one["timeouts"]:
        return ""
    return (
        f"the verifier failed on {one['errors']} and exceeded its time on {one['timeouts']} of "
        f"{one['problems'] * one['samples']} responses, which count as wrong; the reasons are in samples/{name}.jsonl "
        "(detail). If the verifier was at fault, correct it and evaluate into another folder"
    )


#: Bytes that `_probe` hashes at the beginning, in the middle and at the end of a file.
PROBE = 1 << 22


def fingerprint(path: str) -> dict[str, str]:
    """Identify the weights of a model without reading all of them, which would take as long as loading.

    Returns:
        For a folder, file → size and a hash of three parts of it, for every file of weights. For a hub name, {"commit":
        ...} of the snapshot in the local cache. Empty if nothing is known.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        commit = _commit(path)
        return {"commit": commit} if commit else {}
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {file.name: _probe(file) for file in files}


def difference(new: dict[str, str], old: dict[str, str]) -> str:
    """The first difference between two fingerprints, in words; empty if they agree or one is empty."""
    if not new or not old:
        return ""
    changed = next((name for name in sorted({**old, **new}) if new.get(name) != old.get(name)), None)
    return f"{changed} is {new.get(changed, 'not there')}, but was {old.get(changed, 'not there')}" if changed else ""


def _probe(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as stream:
        for start in (0, max(size - PROBE, 0) // 2, max(size - PROBE, 0)):
            stream.seek(start)
            digest.update(stream.read(PROBE))
    return f"{size} bytes, {digest.hexdigest()}"


def _commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    # The name of a snapshot's folder is its commit.
    return Path(cached).parent.name if isinstance(cached, str) else None

"""What is checked before any training: data, tokenizer, limits, answers, algorithm against data, the folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import Composed
from upge import data, verify
from upge.algorithm import Algorithm
from upge.errors import ConfigError, DataError, ModelError
from upge.instantiate import build
from upge.pipeline import Pipeline
from upge.rollout.model import read_config
from upge.train.collect import has_pair, usable
from upge.train.distributed import world_size
from upge.train.folder import RunFolder

#: Columns that this trainer fills beyond rewards, masks and groups.
PROVIDED = ("behavior_logprobs", "sampler_logprobs", "entropies", "reference_logprobs", "preference")


@dataclass(frozen=True)
class Prepared:
    """What a run starts from; `notes` are sentences for the user."""

    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    train: Sequence[data.Example]
    evaluation: Sequence[data.Example]
    folder: RunFolder
    continues: bool
    notes: tuple[str, ...]


def prepare(composed: Composed) -> Prepared:
    """Loads and checks.

    Raises:
        UserError: the first thing that is wrong, naming key or file, what was found and the fix.
    """
    config, algorithm = composed.config, composed.algorithm
    algorithm.check(group_size=config.group_size, provided=PROVIDED)
    _check_stages(algorithm, config.steps)
    folder = RunFolder(output_folder(composed))
    continues = folder.open(composed.tree, config.resume, world_size())
    _check_installed()
    verifier = verify.load(config.verify.verifier)
    splits = build(composed.tree["data"], "data").load()
    _check_answers([*splits.train, *splits.evaluation], verifier)
    _check_length(config)
    tokenizer = load_tokenizer(config.model.path)
    notes: list[str] = []
    train = _encode("training", splits.train, tokenizer, composed, notes)
    evaluation = _encode("evaluation", splits.evaluation, tokenizer, composed, notes)
    demonstrations = sum(example.demonstration_ids is not None for example in train)
    pairs = sum(has_pair(example) for example in train)
    try:
        algorithm.check(group_size=config.group_size, demonstrations=demonstrations, provided=PROVIDED)
        _check_pairs(algorithm, pairs)
    except ConfigError as error:
        # What was dropped for its length may be all that there was.
        raise ConfigError("; ".join([str(error), *notes])) from error
    if algorithm.needs.demonstrations and demonstrations < len(train):
        notes.append(f"{demonstrations} training problems have a demonstration within the limit")
    if algorithm.needs.preference_pairs and pairs < len(train):
        notes.append(f"{pairs} training problems have a preference pair within the limit")
    train = [train[i] for i in usable(train, algorithm.needs)]
    stops = stop_token_ids(tokenizer, config.model.path)
    return Prepared(tokenizer, stops, train, evaluation, folder, continues, tuple(notes))


def _check_stages(algorithm: Algorithm | Pipeline, steps: int) -> None:
    """Refuses a run in which a stage would not happen."""
    for span in Pipeline.of(algorithm).spans(steps) if steps else ():
        if span.first == span.end:
            raise ConfigError(
                f"steps: {steps} leaves none for algo.stages.{span.name} (share {span.stage.share:g}); give more "
                "steps, or stages of more equal shares"
            )


def output_folder(composed: Composed) -> Path:
    """`output`, or the next free runs/ALGO-MODEL-DATA, with the corrections as in ALGO+tis."""
    if composed.config.output:
        return Path(composed.config.output).expanduser()
    names = composed.names
    algo, model, data = (Path(str(names[group])).stem for group in ("algo", "model", "data"))
    stem = f"{'+'.join([algo, *filter(None, str(names['correction'] or '').split(','))])}-{model}-{data}"
    number, path = 1, Path("runs") / stem
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def load_tokenizer(path: str) -> Any:
    """The tokenizer beside the model.

    Raises:
        ModelError: no such model, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.path: no tokenizer could be loaded for '{path}' ({str(error).splitlines()[0]}). Give the folder of "
            "a Hugging Face causal LM, or a hub name that is in the local cache or can be downloaded"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.path: the tokenizer of '{path}' has no end-of-sequence token; no response could end")
    return tokenizer


def stop_token_ids(tokenizer: Any, path: str) -> tuple[int, ...]:
    """The tokenizer's end of sequence and those that generation_config.json adds, the end of a turn for example."""
    from transformers import GenerationConfig

    try:
        more = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        more = None
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *more]))


def _check_installed() -> None:
    """What is needed only after training must not be found missing then."""
    for package in ("jinja2", "matplotlib", "rich", "tqdm"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the package {package} is not installed, the report needs it: pip install 'upge[all]'")


def _check_length(config: Any) -> None:
    if not config.model.path:
        raise ModelError("model.path: empty; give the folder of a Hugging Face causal LM, a hub name, or model=NAME")
    limits = read_config(config.model.path, config.model.overrides)
    longest = getattr(limits, "max_position_embeddings", None)
    wanted = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest is not None and wanted > longest:
        raise ModelError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {wanted} exceeds the {longest} positions of "
            f"'{config.model.path}'; lower one of them, or raise model.overrides.max_position_embeddings"
        )


def _check_answers(problems: Sequence[data.Problem], verifier: Any) -> None:
    check = getattr(verifier, "check_answer", None)
    if check is None:
        return
    for problem in problems:
        try:
            check(problem.answer)
        except ValueError as error:
            raise DataError(f"{problem.where or problem.id}: the answer cannot be verified: {error}") from error


def _check_pairs(algorithm: Algorithm | Pipeline, pairs: int) -> None:
    for path, one in _algorithms(algorithm):
        owner = next((owner for owner, source in one.sources.items() if source == "preference_pairs"), None)
        if owner and not pairs:
            raise ConfigError(
                f"{path}{owner}.source: preference_pairs, but the data set has no rejected responses; choose data that "
                "has them within rollout.max_response_tokens, or an algorithm that learns from other responses"
            )


def _algorithms(algorithm: Algorithm | Pipeline, path: str = "algo.") -> Iterator[tuple[str, Algorithm]]:
    """Every algorithm of a run by its place in the file."""
    if isinstance(algorithm, Pipeline):
        for name, stage in algorithm.stages.items():
            yield from _algorithms(stage.algorithm, f"{path}stages.{name}.algorithm.")
        return
    yield path, algorithm
    if algorithm.validation is not None:
        yield from _algorithms(algorithm.validation, f"{path}validation.")


def _encode(which: str, problems: Sequence[data.Problem], tokenizer: Any, composed: Composed, notes: list[str]) -> list:
    config = composed.config
    encoded = data.encode(
        problems,
        tokenizer,
        template=config.model.template,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        overlong_prompts=config.data_policy.overlong_prompts,
        overlong_demonstrations=config.data_policy.overlong_demonstrations,
        pairs=which == "training" and composed.algorithm.needs.preference_pairs,
    )
    if encoded.dropped_prompts:
        notes.append(f"{which}: {encoded.dropped_prompts} problems dropped: prompt beyond rollout.max_prompt_tokens")
    for count, what in (
        (encoded.dropped_demonstrations, "demonstrations dropped, they exceed"),
        (encoded.truncated_demonstrations, "demonstrations cut, they exceed"),
        (encoded.dropped_pairs, "preference pairs dropped, one side exceeds"),
        (encoded.truncated_pairs, "preference pairs cut, one side exceeds"),
    ):
        if count and which == "training":
            notes.append(f"{which}: {count} {what} rollout.max_response_tokens")
    return list(encoded.examples)

"""The folder of a sweep: where its runs and evaluations are, and which of them are done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.config import compose
from experiments.sweep.settings import Planned, Sweep, text
from upge.errors import ConfigError
from upge.train.files import locked, read_json, write_atomically
from upge.train.folder import RunFolder

#: What to do about a record of a run's settings that cannot be read.
_FIX = "remove that run and its evaluations, or give another output="


class SweepFolder:
    """`runs/LABEL/seed-N`, `evals/NAME/LABEL/seed-N`, `logs/` and the report under a sweep's folder."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.path = sweep, sweep.folder

    def run(self, planned: Planned) -> Path:
        """The folder of a run."""
        return self.path / "runs" / planned.slug

    def evaluation(self, planned: Planned, name: str) -> Path:
        """The folder of a run's evaluation."""
        return self.path / "evals" / name / planned.slug

    def log(self, planned: Planned) -> Path:
        """The output of a run and its evaluations."""
        return self.path / "logs" / f"{planned.slug}.log"

    def is_trained(self, planned: Planned) -> bool:
        """Whether the run is finished."""
        return RunFolder(self.run(planned)).is_finished

    def missing(self, planned: Planned) -> list[str]:
        """Names of the evaluations that are not finished."""
        return [n for n in self.sweep.config.evaluate if not (self.evaluation(planned, n) / "scores.json").is_file()]

    def is_done(self, planned: Planned) -> bool:
        """Whether a run and all its evaluations are finished."""
        return self.is_trained(planned) and not self.missing(planned)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Lock the folder and yield the lock's file descriptor.

        The lock is held until all jobs that got the descriptor are gone, because those of a killed sweep may still be
        running.

        Raises:
            ConfigError: another process holds the lock.
        """
        refusal = (
            f"output: another sweep, or a run that a killed sweep left behind, is using {self.path}; wait for it, or "
            "give another output="
        )
        with locked(self.path, refusal) as descriptor:
            yield descriptor

    def check(self) -> None:
        """Refuse runs that were started under the same name with other settings, and evaluations without their run.

        Raises:
            ConfigError: the message names the first setting that differs, or the evaluation.
        """
        for planned in self.sweep.runs:
            if self._record(planned).is_file() and self.run(planned).exists():
                self._check_same(planned)
            for name in self.sweep.config.evaluate if not self.run(planned).exists() else ():
                if self.evaluation(planned, name).exists():
                    raise ConfigError(
                        f"evaluate.{name}: {self.evaluation(planned, name)} belongs to a run that no longer exists and "
                        "would be taken for an evaluation of the new run; remove it"
                    )

    def _check_same(self, planned: Planned) -> None:
        old, new = _recorded(self._record(planned)), self._content(planned)
        keys = [(name, old["run"].get(name), new["run"].get(name)) for name in {**old["run"], **new["run"]}]
        # New evaluations are allowed, and old ones that are no longer requested do no harm.
        both = [name for name in new["evaluate"] if name in old["evaluate"]]
        keys += [(f"evaluate.{name}", old["evaluate"][name], new["evaluate"][name]) for name in both]
        for name, before, now in keys:
            if before != now:
                raise ConfigError(
                    f"{name}: {now!r} here, but {before!r} when {planned.slug} in {self.path} was started; give "
                    "another output= or the same settings, or remove that run and its evaluations"
                )

    def begin(self, planned: Planned) -> None:
        """Record the settings of a run before it is started; earlier evaluations stay recorded."""
        path, content = self._record(planned), self._content(planned)
        if path.is_file() and self.run(planned).exists():
            content["evaluate"] = _recorded(path)["evaluate"] | content["evaluate"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def adopt(self, planned: Planned) -> Path | None:
        """Copy a finished run with the same settings from a neighboring sweep; its folder, None if there is none.

        Both the command line and the configuration that results from it, with all presets, must be the same. A relative
        path may mean another file in the other sweep, so a run with one is not copied. Evaluations with the same name
        and arguments are copied as well. A run with a file that cannot be read is not copied.
        """
        texts = [value for value in planned.keys.values() if isinstance(value, str)]
        names_places = any(os.path.exists(one) and not os.path.isabs(one) for one in texts)
        if self.run(planned).exists() or not self.path.parent.is_dir() or names_places:
            return None
        own = self._content(planned)["run"]
        for other in sorted(path for path in self.path.parent.iterdir() if path.resolve() != self.path.resolve()):
            # Only runs with the same seed, which is also that of the evaluations.
            for record in sorted((other / "settings").glob(f"*/seed-{planned.seed}.json")):
                slug = record.relative_to(other / "settings").with_suffix("")
                finished = RunFolder(other / "runs" / slug)
                try:
                    content = _recorded(record)
                    is_same = content["run"] == own and finished.is_finished and self._has_settings(finished, planned)
                except ConfigError:
                    continue
                if is_same:
                    self._copy(planned, other, slug, content["evaluate"])
                    return finished.path
        return None

    @staticmethod
    def _has_settings(run: RunFolder, planned: Planned) -> bool:
        """Whether a run has the settings that the command line of `planned` gives today, apart from `output`."""
        return {*run.different(compose(planned.arguments(run.path)).tree)} <= {"output"}

    def _copy(self, planned: Planned, other: Path, slug: Path, evaluated: dict[str, str]) -> None:
        self.begin(planned)
        _copy_atomically(other / "runs" / slug, self.run(planned))
        # After the run: missing evaluations are made again, but there must be none without the run.
        for name, arguments in self._content(planned)["evaluate"].items():
            done = other / "evals" / name / slug
            if evaluated.get(name) == arguments and (done / "scores.json").is_file():
                _copy_atomically(done, self.evaluation(planned, name))

    def _record(self, planned: Planned) -> Path:
        return self.path / "settings" / f"{planned.slug}.json"

    def _content(self, planned: Planned) -> dict:
        """The settings that must not change: the keys of the run and of its evaluations."""
        asked = self.sweep.config.evaluate.items()
        evaluations = {name: " ".join(f"{k}={text(v)}" for k, v in keys.items()) for name, keys in asked}
        return {"run": {name: text(value) for name, value in planned.keys.items()}, "evaluate": evaluations}


def _recorded(path: Path) -> dict[str, Any]:
    """The settings that a sweep has recorded of a run.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    content = read_json(path, _FIX)
    if not all(isinstance(content.get(part), dict) for part in ("run", "evaluate")):
        raise ConfigError(f"{path}: it does not hold the settings of a run and its evaluations; {_FIX}")
    return content


def _copy_atomically(source: Path, target: Path) -> None:
    """Copy a folder atomically: if this is interrupted, `target` does not exist."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)

"""The folder of a sweep: where its runs and evaluations stand, and which of them are done."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.config import compose
from experiments.sweep.settings import Planned, Sweep, text
from upge.errors import ConfigError
from upge.train.folder import RunFolder, write_atomically


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
        """What a run and its evaluations printed."""
        return self.path / "logs" / f"{planned.slug}.log"

    def is_trained(self, planned: Planned) -> bool:
        """True if its last step's model is there."""
        return RunFolder(self.run(planned)).is_finished

    def missing(self, planned: Planned) -> list[str]:
        """Names of the evaluations that are not finished."""
        return [n for n in self.sweep.config.evaluate if not (self.evaluation(planned, n) / "scores.json").is_file()]

    def is_done(self, planned: Planned) -> bool:
        """True if nothing is left to do for it."""
        return self.is_trained(planned) and not self.missing(planned)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Nobody else runs anything in the folder meanwhile; the file descriptor of the lock, which is held until all
        processes that have it are gone: what a killed sweep had started may still be at work.

        Raises:
            ConfigError: somebody else does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"output: another sweep, or a run that a killed one has left, is at work in {self.path}; wait for "
                    "it, or give another output="
                ) from None
            yield file.fileno()

    def check(self) -> None:
        """Refuses runs that were begun under the same name with other settings, and models' evaluations without them.

        Raises:
            ConfigError: the first setting that differs, by its key, or the evaluation.
        """
        for planned in self.sweep.runs:
            if not self.run(planned).exists():
                self._check_no_evaluation(planned)
            elif self._record(planned).is_file():
                self._check_same(planned)

    def _check_same(self, planned: Planned) -> None:
        old, new = json.loads(self._record(planned).read_text()), self._content(planned)
        keys = [(name, old["run"].get(name), new["run"].get(name)) for name in {**old["run"], **new["run"]}]
        # An evaluation may be new, and one that is no longer asked for is in nobody's way.
        both = [name for name in new["evaluate"] if name in old["evaluate"]]
        keys += [(f"evaluate.{name}", old["evaluate"][name], new["evaluate"][name]) for name in both]
        for name, before, now in keys:
            if before != now:
                raise ConfigError(
                    f"{name}: {now!r} here, but {before!r} when {planned.slug} in {self.path} was begun; give another "
                    "output=, the same settings, or remove that run and its evaluations"
                )

    def _check_no_evaluation(self, planned: Planned) -> None:
        for name in self.sweep.config.evaluate:
            if self.evaluation(planned, name).exists():
                raise ConfigError(
                    f"evaluate.{name}: {self.evaluation(planned, name)} is of a run that is no longer there, and would "
                    "pass for one of the run that is to be made; remove it"
                )

    def begin(self, planned: Planned) -> None:
        """Notes the settings of a run that is to be started; evaluations of before stay noted."""
        path, content = self._record(planned), self._content(planned)
        if path.is_file() and self.run(planned).exists():
            content["evaluate"] = json.loads(path.read_text())["evaluate"] | content["evaluate"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def adopt(self, planned: Planned) -> Path | None:
        """Takes over what another sweep beside this one has made with the very same settings; None if there is no such
        run.

        The same are what the command lines say and what it comes to, with all presets. A file or folder that is named
        by a relative path may be another one for whoever ran that sweep, so such a run is made anew. Evaluations come
        along where they were asked for by the same name and arguments.
        """
        if self.run(planned).exists() or not self.path.parent.is_dir() or _names_places(planned):
            return None
        own = self._content(planned)["run"]
        for other in sorted(path for path in self.path.parent.iterdir() if path.resolve() != self.path.resolve()):
            # By its seed, which is the evaluations', too.
            for record in sorted((other / "settings").glob(f"*/seed-{planned.seed}.json")):
                slug, content = record.relative_to(other / "settings").with_suffix(""), json.loads(record.read_text())
                found = RunFolder(other / "runs" / slug)
                if content["run"] == own and found.is_finished and self._came_to(found, planned):
                    self._copy(planned, other, slug, content["evaluate"])
                    return found.path
        return None

    @staticmethod
    def _came_to(found: RunFolder, planned: Planned) -> bool:
        """True if a run's settings are what the command line of `planned` comes to today; where it stands is none."""
        return {*found.different(compose(planned.arguments(found.path)).tree)} <= {"output"}

    def _copy(self, planned: Planned, other: Path, slug: Path, evaluated: dict[str, str]) -> None:
        self.begin(planned)
        _copy_at_once(other / "runs" / slug, self.run(planned))
        # Only now: where this is interrupted they are made anew, whereas there must be none without the run.
        for name, arguments in self._content(planned)["evaluate"].items():
            done = other / "evals" / name / slug
            if evaluated.get(name) == arguments and (done / "scores.json").is_file():
                _copy_at_once(done, self.evaluation(planned, name))

    def _record(self, planned: Planned) -> Path:
        return self.path / "settings" / f"{planned.slug}.json"

    def _content(self, planned: Planned) -> dict:
        """What must not change: the run's keys, and an evaluation's."""
        asked = self.sweep.config.evaluate.items()
        evaluations = {name: " ".join(f"{k}={text(v)}" for k, v in keys.items()) for name, keys in asked}
        return {"run": {name: text(value) for name, value in planned.keys.items()}, "evaluate": evaluations}


def _names_places(planned: Planned) -> bool:
    """True if a key of the run is the relative path of something that exists."""
    texts = [value for value in planned.keys.values() if isinstance(value, str)]
    return any(os.path.exists(one) and not os.path.isabs(one) for one in texts)


def _copy_at_once(source: Path, target: Path) -> None:
    """The whole folder or nothing of it, whenever this is interrupted."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)

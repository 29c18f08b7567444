"""The folder of a sweep: where its runs and evaluations stand, and which of them are done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from experiments.sweeping.settings import Planned, Sweep, text
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

    def check(self) -> None:
        """Refuses runs that were begun under the same name with other settings, and notes what each is.

        Raises:
            ConfigError: the first that differs, by its key.
        """
        for planned in self.sweep.runs:
            path = self._record(planned)
            if not path.is_file():
                continue
            old, new = json.loads(path.read_text()), self._content(planned)
            for part in new:
                for name in {**old[part], **new[part]}:
                    if old[part].get(name) != new[part].get(name):
                        raise ConfigError(
                            f"{name}: {new[part].get(name)!r} here, but {old[part].get(name)!r} when {planned.slug} in "
                            f"{self.path} was begun; give another output=, the same settings, or remove that run"
                        )

    def begin(self, planned: Planned) -> None:
        """Notes the settings of a run that is to be started."""
        path = self._record(planned)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self._content(planned), indent=1) + "\n")

    def adopt(self, planned: Planned) -> Path | None:
        """Takes over what another sweep beside this one has made with the very same settings, which says all that a
        run depends on; None if there is no such run.

        Evaluations come along where they were asked for by the same name and arguments.
        """
        if self.run(planned).exists() or not self.path.parent.is_dir():
            return None
        own = self._content(planned)
        for other in sorted(path for path in self.path.parent.iterdir() if path.resolve() != self.path.resolve()):
            for record in sorted((other / "settings").glob("*/seed-*.json")):
                slug, content = record.relative_to(other / "settings").with_suffix(""), json.loads(record.read_text())
                if content["run"] == own["run"] and RunFolder(other / "runs" / slug).is_finished:
                    self._copy(planned, other, slug, content["evaluate"])
                    return other / "runs" / slug
        return None

    def _copy(self, planned: Planned, other: Path, slug: Path, evaluated: dict[str, str]) -> None:
        asked = self._content(planned)["evaluate"]
        for name, arguments in asked.items():
            done = other / "evals" / name / slug
            if evaluated.get(name) == arguments and (done / "scores.json").is_file():
                shutil.copytree(done, self.evaluation(planned, name))
        # Last, because it is by the run that one sees whether there is anything to take over.
        shutil.copytree(other / "runs" / slug, self.run(planned))
        self.begin(planned)

    def _record(self, planned: Planned) -> Path:
        return self.path / "settings" / f"{planned.slug}.json"

    def _content(self, planned: Planned) -> dict:
        """What must not change: the run's keys, and an evaluation's."""
        asked = self.sweep.config.evaluate.items()
        evaluations = {name: " ".join(f"{k}={text(v)}" for k, v in keys.items()) for name, keys in asked}
        return {"run": {name: text(value) for name, value in planned.keys.items()}, "evaluate": evaluations}

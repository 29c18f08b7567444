"""`log_to`: the metrics and evaluations of a run in TensorBoard, trackio and Weights & Biases, besides its folder.

A continued run remains one run there, with one value per step even if an interrupted attempt has logged some already.
"""

from __future__ import annotations

import json
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.packages import INSTALL, is_installed
from upge.errors import ConfigError
from upge.train.config import RunConfig
from upge.train.files import read_json, write_atomically

#: In the run's folder: the run's name in trackio and id in wandb, and the last step that each logger has.
STATE = "loggers.json"


@dataclass(frozen=True)
class Start:
    """What a logger is started with.

    Attributes:
        folder: of the run.
        continues: whether the run continues an earlier one.
        from_step: the step that it continues from.
        id: the same for every start of the run; `Loggers` sets it.
    """

    folder: Path
    project: str
    config: Mapping[str, Any]
    continues: bool
    from_step: int
    id: str = ""


class Logger(ABC):
    """A library that shows metrics.

    Attributes:
        forgets: True = it drops what it has of the steps after the checkpoint that a run continues from; False = these
            steps must not be logged again.
    """

    forgets = False

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""

    @abstractmethod
    def finish(self, code: int) -> None:
        """End the run with this exit code."""


class TensorBoard(Logger):
    """Event files in the run's folder, read by `tensorboard --logdir runs`."""

    forgets = True

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start.from_step + 1 if start.continues else None
        self._writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=purge, flush_secs=30)
        self._writer.add_text("config", f"```\n{json.dumps(start.config, indent=2, default=str)}\n```", start.from_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, code: int) -> None:
        self._writer.close()


class Trackio(Logger):
    """A run of trackio: on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

    def __init__(self, start: Start) -> None:
        import trackio

        # trackio knows a run by its name alone.
        self._run = trackio.init(start.project, name=start.id, config=dict(start.config), resume="allow", embed=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, code: int) -> None:
        self._run.finish()


class Wandb(Logger):
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, start: Start) -> None:
        import wandb

        self._run = wandb.init(
            project=start.project,
            id=start.id,
            name=start.folder.name,
            config=dict(start.config),
            dir=str(start.folder),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, code: int) -> None:
        self._run.finish(exit_code=code)


LOGGERS: dict[str, Callable[[Start], Logger]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


class Loggers:
    """The loggers of a run. They exist on the main rank alone.

    A logger that fails ends, with a note, and the run goes on without it.

    Args:
        names: those of `log_to`.
        start: of the run.
        note: prints a sentence.

    Raises:
        ConfigError: a logger cannot start.
    """

    def __init__(self, names: list[str], start: Start, note: Callable[[str], None]) -> None:
        self._note, self._path = note, start.folder / STATE
        self._loggers: dict[str, Logger] = {}
        self._last: dict[str, dict[str, int]] = {}
        chosen = [name for name in LOGGERS if name in names]
        if not chosen:
            return
        saved = read_json(self._path, "remove it, and the loggers begin new runs")
        self._id, known = str(saved.get("id") or f"{start.folder.name}-{secrets.token_hex(4)}"), saved.get("last")
        start = replace(start, id=self._id)
        for name in chosen:
            self._last[name] = dict(known[name]) if isinstance(known, Mapping) and name in known else {}
            try:
                self._loggers[name] = LOGGERS[name](start)
            except Exception as error:  # of the library: no login, no network, a folder that cannot be written
                self.close(1)
                offline = "; WANDB_MODE=offline logs on this machine alone" if name == "wandb" else ""
                raise ConfigError(f"{name} cannot start: {_first(error)}{offline}", "log_to") from error
        self._save()

    def close(self, code: int) -> None:
        """End the loggers of a run with this exit code."""
        for name in [*self._loggers]:
            self._try(name, lambda logger: logger.finish(code))
        self._loggers.clear()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a training step."""
        values = {key: value for key, value in metrics.items() if key != "step" and _is_number(value)}
        self._log("metrics", values, int(metrics["step"]))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Log a line of evaluations.jsonl: eval/SCORE, and eval/LEVEL/SCORE of each level."""
        values = {f"eval/{name}": value for name, value in line["all"].items() if _is_number(value)}
        for level, scores in (line.get("levels") or {}).items():
            values |= {f"eval/{level}/{name}": value for name, value in scores.items() if _is_number(value)}
        self._log("evaluations", values, int(line["step"]))

    def _log(self, kind: str, values: Mapping[str, float], step: int) -> None:
        for name in [*self._loggers]:
            logger, last = self._loggers[name], self._last[name]
            if logger.forgets or step > last.get(kind, -1):
                self._try(name, lambda logger: logger.log(values, step))
                last[kind] = step
        if self._loggers:
            self._save()

    def _try(self, name: str, work: Callable[[Logger], None]) -> None:
        try:
            work(self._loggers[name])
        except Exception as error:  # whatever it is, the run itself is not concerned
            self._note(f"log_to: {name} failed ({_first(error)}); the run goes on without it")
            del self._loggers[name]

    def _save(self) -> None:
        write_atomically(self._path, json.dumps({"id": self._id, "last": self._last}, indent=2) + "\n")


def check_loggers(config: RunConfig) -> None:
    """Refuse loggers whose packages are not installed.

    Raises:
        ConfigError: the message has the command that installs the package.
    """
    for name in config.log_to:
        if name in LOGGERS and not is_installed(name):
            raise ConfigError(f"the package {name} is not installed; run `pip install {INSTALL[name]}`", "log_to")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"

"""The place of a fault on purpose in a run, and the mark of a model that was trained with one.

A fault replaces objects of a run by others of the same kind. The trainer asks for no particular one and has none in
itself: what exists is in `experiments.run.faults`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upge.errors import ConfigError
from upge.train.files import read_json

if TYPE_CHECKING:
    from upge.data import Example
    from upge.rollout import Sampler
    from upge.train.update import Updater

#: The value of the key `fault` without a fault.
NONE = "none"
#: In the folder of a model that was trained with a fault: {"fault": name}.
MARK = "fault.json"


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Fault:
    """What the objects of a run are replaced by. Without a fault they are themselves.

    Attributes:
        name: as the key `fault` gives it.
        summary: what it changes, one sentence.
        examples: the training set that the steps use, from the one that was prepared.
        sampler: the engine of training rollouts, from the one that was started.
        updater: what makes updates, from the one that a learner has built.
    """

    name: str = NONE
    summary: str = ""
    examples: Callable[[Sequence[Example]], Sequence[Example]] = _same
    sampler: Callable[[Sampler], Sampler] = _same
    updater: Callable[[Updater], Updater] = _same

    @property
    def is_on(self) -> bool:
        """Whether there is a fault."""
        return self.name != NONE

    def metrics(self) -> dict[str, float]:
        """A metric of every step that names the fault; empty without one."""
        return {f"fault/{self.name}": 1.0} if self.is_on else {}

    def describe(self) -> str:
        """What a run says about itself; empty without a fault."""
        return f"FAULT ON PURPOSE, fault={self.name}: {self.summary}" if self.is_on else ""

    def mark(self, folder: Path) -> None:
        """Marks the exported model in `folder`: MARK, and a model card. Nothing is written without a fault."""
        if not self.is_on:
            return
        card = (
            f"# A model trained with a fault on purpose\n\n`fault={self.name}`: {self.summary}\n\n"
            "It shows what the fault does. It is not a result of its algorithm; do not use it as one.\n"
        )
        (folder / MARK).write_text(json.dumps({"fault": self.name}) + "\n", "utf-8")
        (folder / "README.md").write_text(card, "utf-8")


def marked(folder: str | Path) -> str:
    """The fault that the model in `folder` was trained with; 'none' for a model without a mark."""
    return str(read_json(Path(folder).expanduser() / MARK, "restore it from the run").get("fault", NONE))


def check_mark(folder: str | Path, name: str = NONE, key: str = "model.path") -> None:
    """Refuses a model that was trained with another fault than `name`.

    Raises:
        ConfigError: by `key`.
    """
    found = marked(folder)
    if found not in (NONE, name):
        raise ConfigError(
            f"'{folder}' was trained with a fault on purpose, fault={found} ({MARK} in it); choose a model that was "
            "not, and do not take this one for a result",
            key,
        )

"""How a run takes a fault on purpose, and the mark of a model that was trained with one.

A fault replaces objects of a run by others of the same type. The faults themselves are in `experiments.run.faults`; the
trainer contains none.
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
#: The file in the folder of a model that was trained with a fault: {"fault": name}.
MARK = "fault.json"


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Fault:
    """Functions that replace objects of a run; by default they return the object unchanged.

    Attributes:
        name: the value of the key `fault`.
        summary: what the fault changes, in one sentence.
        examples: maps the training set that was prepared to the one that the steps use.
        sampler: maps the sampler that was started to the one that training rollouts use.
        updater: maps the updater that a learner has built to the one that makes the updates.
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
        """The line that a run prints; empty without a fault."""
        return f"FAULT ON PURPOSE, fault={self.name}: {self.summary}" if self.is_on else ""

    def mark(self, folder: Path) -> None:
        """Mark the exported model in `folder` by the file MARK and a model card; do nothing without a fault."""
        if not self.is_on:
            return
        card = (
            f"# A model trained with a fault on purpose\n\n`fault={self.name}`: {self.summary}\n\n"
            "It shows the effect of the fault. Do not report it as a result of the algorithm.\n"
        )
        (folder / MARK).write_text(json.dumps({"fault": self.name}) + "\n", "utf-8")
        (folder / "README.md").write_text(card, "utf-8")


def marked(folder: str | Path) -> str:
    """The fault that the model in `folder` was trained with; 'none' for a model without a mark."""
    return str(read_json(Path(folder).expanduser() / MARK, "restore it from the run").get("fault", NONE))


def check_mark(folder: str | Path, name: str = NONE, key: str = "model.path") -> None:
    """Refuse a model that was trained with another fault than `name`.

    Raises:
        ConfigError: the model has another fault; the error's key is `key`.
    """
    found = marked(folder)
    if found not in (NONE, name):
        raise ConfigError(
            f"'{folder}' was trained with a fault on purpose, fault={found} (see its {MARK}); choose a model that was "
            "trained without one",
            key,
        )

"""The algorithms of this project that frameworks have as well, with the settings that make them the same.

Advantages are those of this project in every case in which a framework's loss gets them from outside.
"""

from __future__ import annotations

from typing import Any

from experiments.referee.protocol import LAYOUTS, LIMIT, Case, Layout

Known = tuple[str, tuple[str, ...]]
GRPO: Known = ("grpo", ())
DR_GRPO: Known = ("dr_grpo", (f"terms.rl.reduction.length={LIMIT}",))
#: Without the length penalty, which is a separate reward in the frameworks.
DAPO: Known = ("dapo", ("terms.rl.estimator.advantage={_target_: upge.GroupRelative}",))
CISPO: Known = ("cispo", ())
SAPO: Known = ("sapo", ())
VESPO: Known = ("vespo", ())
GSPO: Known = ("gspo", ())
LUSPO: Known = ("luspo", ())
GMPO: Known = ("gmpo", ())
SFT: Known = ("sft", ())
DFT: Known = ("dft", ())
#: Overrides that change the reduction of an algorithm of rollouts.
TOKEN_MEAN = ("terms.rl.reduction={_target_: upge.TokenMean}",)
SEQUENCE_MEAN = ("terms.rl.reduction={_target_: upge.SequenceMean}",)


def named(
    name: str,
    known: Known,
    settings: dict[str, Any],
    layouts: tuple[Layout, ...] = LAYOUTS,
    extra: tuple[str, ...] = (),
) -> Case:
    """The case of a framework's loss."""
    algorithm, overrides = known
    return Case(name, algorithm, (*overrides, *extra), settings, layouts)

"""What `python -m experiments.run --help` prints: algorithms, models, data sets, and every key."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

import algorithms
from experiments.cli import help_row
from experiments.config import CONFIGS, GROUPS, presets
from experiments.describe import correction_description
from upge.config import meanings
from upge.train.config import RunConfig

USAGE = """\
Usage: python -m experiments.run [algo=NAME] [correction=NAME] [model=NAME] [data=NAME] [recipe=NAME] [key=value ...]
       [--dry-run]

Trains a model and leaves a folder with config.yaml, metrics.jsonl, evaluations.jsonl, rollouts/, checkpoints/, final/
and report.html. Several processes: torchrun --nproc_per_node N -m experiments.run ..., or deepspeed --num_gpus N.
--dry-run builds everything except the weights. It prints the configuration, formula, prompt, work per step and memory
per rank, and refuses a run that cannot fit.
"""


def help_text() -> str:
    """The whole text, at most 120 columns wide."""
    parts = [USAGE, "Algorithms (algo=NAME; each part is a key, for example algo.terms.rl.estimator.mask.high=0.28):"]
    parts += [help_row(name, algorithms.load(name).description) for name in presets("algo")]
    parts.append("\nCorrections (correction=NAME or [NAME,NAME]; a setting is correction.NAME.KEY=VALUE):")
    parts += [help_row(name, correction_description(name)) for name in presets("correction")]
    for group in ("model", "data", "recipe"):
        parts.append(f"\n{_HEADS[group]}")
        parts += [help_row(name, _first_comment(CONFIGS / group / f"{name}.yaml")) for name in presets(group)]
    for name in presets("data"):
        parts.append(f"\nKeys of data={name}:")
        parts += [help_row(f"data.{key}={_shown(value)}", meaning) for key, value, meaning in _data_keys(name)]
    parts.append("\nKeys of a run, with their defaults (presets may set others):")
    for key, default, meaning in meanings(RunConfig):
        parts.append(help_row(f"{key}={GROUPS.get(key) or _shown(default)}", meaning))
    return "\n".join(parts)


def _shown(value: object) -> str:
    """A value as typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or '""'


_HEADS = {
    "model": "Models (model=NAME, or a folder, or a hub name with a slash):",
    "data": "Data sets (data=NAME):",
    "recipe": "Recipes, named settings of several keys (recipe=NAME):",
}


def _first_comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _data_keys(name: str) -> list[tuple[str, object, str]]:
    """(key, default, meaning) of a data set; the meaning is the comment after a key, or on the line before it."""
    path = CONFIGS / "data" / f"{name}.yaml"
    node = OmegaConf.to_container(OmegaConf.load(path))["data"]
    comments: dict[str, str] = {}
    before = ""
    for line in path.read_text().splitlines()[1:]:
        code, _, comment = line.partition("#")
        key = code.strip().partition(":")[0]
        if key in node:
            comments[key] = comment.strip() or before
        before = comment.strip() if not code.strip() else ""
    return [(key, value, comments.get(key, "")) for key, value in node.items() if key != "_target_"]

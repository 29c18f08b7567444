"""What `python -m experiments.run --help` prints: algorithms, models, data sets, and every key."""

from __future__ import annotations

import textwrap
from pathlib import Path

from omegaconf import OmegaConf

import algorithms
from experiments.config import CONFIGS, GROUPS, presets
from upge.train.config import meanings

USAGE = """\
Usage: python -m experiments.run [algo=NAME] [model=NAME] [data=NAME] [recipe=NAME] [key=value ...] [--dry-run]

Trains a model and leaves a folder with config.yaml, metrics.jsonl, evaluations.jsonl, rollouts/, checkpoints/, final/ and
report.html. Several processes: torchrun --nproc_per_node N -m experiments.run ..., or deepspeed --num_gpus N.
--dry-run checks everything that can be checked before training and prints the resolved configuration.
"""


def help_text() -> str:
    """The whole text, at most 120 columns wide."""
    parts = [USAGE, "Algorithms (algo=NAME; each part is a key, for example algo.terms.rl.estimator.mask.high=0.28):"]
    parts += [f"  {name:<12} {algorithms.load(name).description}" for name in presets("algo")]
    for group in ("model", "data", "recipe"):
        parts.append(f"\n{_HEADS[group]}")
        parts += [f"  {name:<20} {_first_comment(CONFIGS / group / f'{name}.yaml')}" for name in presets(group)]
    parts.append("\nKeys of the data sets (data.KEY=VALUE):")
    for name in presets("data"):
        parts += [f"  data={name}: data.{line}" for line in _data_keys(name)]
    parts.append(f"\nKeys of a run, with their defaults (presets may set others; algo={GROUPS['algo']} etc. by default):")
    for key, default, meaning in meanings():
        shown = GROUPS[key] if key in GROUPS else ('""' if default == "" else default)
        parts += textwrap.wrap(
            f"{f'{key}={shown}':<36} {meaning}", 118, initial_indent="  ", subsequent_indent=" " * 39
        )
    return "\n".join(parts)


_HEADS = {
    "model": "Models (model=NAME, or a folder, or a hub name with a slash):",
    "data": "Data sets (data=NAME):",
    "recipe": "Recipes, named settings of several keys (recipe=NAME):",
}


def _first_comment(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _data_keys(name: str) -> list[str]:
    """`key=default  meaning` of a data set, off its preset's comments."""
    path = CONFIGS / "data" / f"{name}.yaml"
    node = OmegaConf.to_container(OmegaConf.load(path))["data"]
    meanings_of = {}
    for line in path.read_text().splitlines():
        code, _, comment = line.partition("#")
        if ":" in code and comment:
            meanings_of[code.split(":")[0].strip()] = comment.strip()
    return [f"{key}={value}  {meanings_of.get(key, '')}".rstrip() for key, value in node.items() if key != "_target_"]

"""A sweep's file and command line: which runs it has, how they are measured, what is compared."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.arguments import parse, split
from experiments.config import CONFIGS
from experiments.sweeping.config import FOLDER_NAME, SweepConfig
from upge.errors import ConfigError, nearest
from upge.train.config import from_tree

FOLDER = CONFIGS / "sweep"
#: Keys whose values experiments.run always reads as YAML; those of other texts it takes as they stand.
_PARSED = ("data.", "algo.", "model.overrides.")
_SEEDS = re.compile(r"(\d+)\.\.(\d+)")
_LABEL = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        label: what it is called in tables, the same for all seeds.
        point: the values of the grid's keys.
        variant: its variant's label; empty where there are none.
        seed: its seed.
        keys: everything that its command line says, but the output.
    """

    label: str
    point: Mapping[str, Any]
    variant: str
    seed: int
    keys: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """Its place below runs/ and evals/."""
        return f"{self.folder}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return _LABEL.sub("-", self.label).strip("-")

    def arguments(self, output: Path) -> list[str]:
        """Those of experiments.run."""
        return [*(f"{name}={_typed(name, value)}" for name, value in self.keys.items()), f"output={output}"]


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to be run; `runs` lists those of one label side by side, by seed."""

    name: str
    config: SweepConfig
    runs: tuple[Planned, ...]
    folder: Path

    @property
    def labels(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def baseline(self) -> str:
        """Against which the others are tested."""
        return self.config.baseline or self.labels[0]


def names() -> list[str]:
    """The sweeps that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(arguments: Sequence[str]) -> Sweep:
    """The sweep of a command line.

    Raises:
        ConfigError: no such sweep, an unknown key, or runs that cannot be told apart.
    """
    name, tree, given = "", {}, []
    for argument in arguments:
        head, value = split(argument)
        if head == "sweep":
            name = value
        else:
            given.append(argument)
    if name:
        tree = _file(name)
    for argument in given:
        _set(tree, *split(argument))
    config = from_tree(SweepConfig, tree)
    stem = Path(name).stem if name else "sweep"
    folder = Path(config.output).expanduser() if config.output else Path("sweeps") / stem
    runs = tuple(_runs(config))
    _check_used(config, given)
    for run in runs:
        if not FOLDER_NAME.fullmatch(run.folder):
            raise ConfigError(f"variants, grid: '{run.label}' has no letter or digit to call a folder by; give another")
    slugs = [run.slug for run in runs]
    twice = next((slug for slug in slugs if slugs.count(slug) > 1), None)
    if twice:
        raise ConfigError(f"variants, grid: two runs would be called {twice}; give them labels that differ")
    sweep = Sweep(stem, config, runs, folder)
    if config.baseline and config.baseline not in sweep.labels:
        raise ConfigError(f"baseline: no runs '{config.baseline}'; {nearest(config.baseline, sweep.labels)}")
    return sweep


def text(value: Any) -> str:
    """A value of a file as one would type it on a command line."""
    if value is None or isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _typed(name: str, value: Any) -> str:
    """`text`, in quotes where a text would be read as something else, such as a number."""
    written = text(value)
    if not isinstance(value, str) or not name.startswith(_PARSED):
        return written
    try:
        same = parse(name, written) == value
    except ConfigError:
        same = False
    return written if same else json.dumps(value, ensure_ascii=False)


def seeds_of(value: Any) -> list[int]:
    """[0, 1, 2], 3, or '0..4' as a list."""
    match = _SEEDS.fullmatch(value) if isinstance(value, str) else None
    if match and int(match[1]) <= int(match[2]):
        return list(range(int(match[1]), int(match[2]) + 1))
    found = [0] if value is None else value if isinstance(value, list) else [value]
    if not found or not all(type(seed) is int and seed >= 0 for seed in found) or len({*found}) < len(found):
        raise ConfigError(f"seeds: found {value!r}; give distinct whole numbers as a list such as [0,1,2], or 0..4")
    return list(found)


def _file(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"sweep: no sweep '{name}'; {nearest(name, names())}, or give a YAML file")
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"sweep: {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"sweep: {path} must be a mapping of a sweep's keys; --help lists them")
    # A key with nothing behind it is as good as none.
    return {name: value for name, value in tree.items() if value is not None}


def _set(tree: dict[str, Any], name: str, value: str) -> None:
    """One key=value of the command line: a key of the sweep, of its grid, of an evaluation, or of every run."""
    head, _, rest = name.partition(".")
    if head in ("grid", "evaluate") and rest:
        where = tree.setdefault(head, {})
        if head == "evaluate" and isinstance(where, dict):
            one, _, rest = rest.partition(".")
            if one not in where or not rest:
                raise ConfigError(f"{name}: no evaluation '{one}' in the sweep; {nearest(one, where)}")
            where = where[one]
        if not isinstance(where, dict):
            raise ConfigError(f"{name}: {head} is {where!r}, which has no keys below it")
        where[rest] = parse(name, value)
    elif name in SweepConfig.__dataclass_fields__:
        tree[name] = value if name in ("output", "title", "baseline") else parse(name, value)
    else:
        tree.setdefault("common", {})[name] = parse(name, value)


def _check_used(config: SweepConfig, given: Sequence[str]) -> None:
    """Refuses a key of the command line that no run would have from there, because all say it themselves."""
    for name in (argument.partition("=")[0] for argument in given):
        if name in config.common:
            everywhere = bool(config.variants) and all(name in own for own in config.variants.values())
            if everywhere or name in config.grid:
                place = "the grid has" if name in config.grid else "every variant has"
                raise ConfigError(f"{name}: {place} values of its own, so this one does nothing; change it there")


def _runs(config: SweepConfig) -> Iterator[Planned]:
    for variant, own in (config.variants or {"": {}}).items():
        for values in itertools.product(*config.grid.values()):
            point = dict(zip(config.grid, values, strict=True))
            for seed in seeds_of(config.seeds):
                keys = {**config.common, **own, **point, **dict.fromkeys(config.seed_keys, seed)}
                yield Planned(_label(variant, point), point, str(variant), seed, keys)


def _label(variant: str, point: Mapping[str, Any]) -> str:
    named, short = ("algo", "model", "data", "recipe"), [_short(name) for name in point]
    parts = []
    for name, value in point.items():
        own = _short(name) if short.count(_short(name)) == 1 else name
        parts.append(text(value) if name in named else f"{own}={text(value)}")
    return ", ".join(filter(None, [str(variant), *parts])) or "run"


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]

"""A sweep's file and command line: its keys, its runs, their evaluations, and what is compared."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import CONFIGS
from experiments.files import output_path
from upge.config import Settings, from_tree, key, parse, split
from upge.errors import ConfigError, nearest
from upge.train.faults import NONE
from upge.trees import read_yaml

#: Costs of a run, the columns of runs.csv, with their displayed names. FLOPs are 2 per parameter and generated token,
#: and 6 per parameter and token of a forward and backward pass; attention and sampling's prompts are not counted.
COSTS = {
    "updates": "updates",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "flops": "FLOPs",
    "training_seconds": "seconds",
}
#: Folder names that are valid on any system.
FOLDER_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class SweepConfig(Settings):
    """The keys of a sweep's file. `common`, `variants` and `grid` hold dotted keys of experiments.run."""

    title: str = key("", "the sweep's question, one line")
    common: dict = key({}, "keys of every run; keys of a run on the command line go here")
    variants: dict = key({}, "label -> keys of the runs with this label")
    grid: dict = key({}, "key -> list of values; every combination is run, for every variant")
    seeds: Any = key(None, "list of seeds, or a range such as 0..4; unset = 0")
    seed_keys: list = key(["seed"], "keys that are set to the seed")
    evaluate: dict = key({}, "name -> arguments of experiments.evaluate for every finished run, such as suite: paper")
    choose: dict = key({}, "sweep: another sweep, run first; key: its best value goes to each run; see docs/sweep.md")
    select: dict = key({}, "key: the grid key whose best value is chosen; measure: the column of runs.csv to choose by")
    baseline: str = key("", "label that the others are tested against; empty = the first")
    match: dict = key({}, "compare at equal cost: costs, measure, levels (name -> levels), budget; see docs/sweep.md")
    measures: list = key([], "columns of runs.csv for the table and the tests; empty = those of the evaluations")
    jobs: int = key(
        0,
        "runs at once, several on a GPU if necessary; 0 = the number of GPUs, or of cores without GPUs",
        minimum=0,
        limit=4096,
    )
    gpus_per_run: int = key(1, "GPUs of one run, if there are any; more than 1 starts torchrun", minimum=1, limit=4096)
    output: str = key("", "folder of the sweep; empty = sweeps/NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, entries in (("variants", self.variants), ("evaluate", self.evaluate)):
            for label, keys in entries.items():
                if not isinstance(keys, Mapping):
                    raise ConfigError(f"{name}.{label}: found {keys!r}, expected keys and values below it")
        self._check_evaluations()
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid.{name}: found {values!r}; give a list of values")
        self._check_seeds()
        runs = math.prod(map(len, self.grid.values())) * max(1, len(self.variants)) * len(seeds_of(self.seeds))
        if runs > MOST_RUNS:
            raise ConfigError(f"grid, variants, seeds: {runs} runs, more than {MOST_RUNS}; give fewer of one of them")
        for name, keys, more in (("choose", ("sweep", "key"), {"group"}), ("select", ("key", "measure"), set())):
            given = getattr(self, name)
            if given and {*given} - more != {*keys}:
                raise ConfigError(f"{name}: found the keys {sorted(given)}; give {' and '.join(keys)}")
        self._check_match()
        if self.select and self.select["key"] not in self.grid:
            raise ConfigError(f"select.key: {self.select['key']} is not in the grid; {nearest('', self.grid)}")

    def _check_match(self) -> None:
        if not self.match:
            return
        if {*self.match} - {"budget"} != {"costs", "measure", "levels"}:
            found = f"match: found the keys {sorted(self.match)}"
            raise ConfigError(f"{found}; give costs, measure and levels, and budget if only some variants set it")
        costs, levels, budget = self.match["costs"], self.match["levels"], self.match.get("budget", [])
        unknown = [cost for cost in costs if cost not in COSTS] if isinstance(costs, list) else [costs]
        if unknown or not costs:
            raise ConfigError(f"match.costs: found {costs!r}; give a list of {', '.join(COSTS)}")
        if not (isinstance(levels, Mapping) and levels and all(isinstance(v, list) and v for v in levels.values())):
            raise ConfigError(f"match.levels: found {levels!r}; give names with lists of levels below them")
        if not isinstance(budget, list) or not {*map(str, budget)} <= {*self.variants}:
            raise ConfigError(f"match.budget: found {budget!r}; give a list of names of variants")

    def _check_evaluations(self) -> None:
        for name, keys in self.evaluate.items():
            if not FOLDER_NAME.fullmatch(str(name)):
                raise ConfigError(f"evaluate.{name}: give it a name of letters, digits and any of _ . + -")
            for own in {"model", "model.path", "output"} & {*keys}:
                raise ConfigError(f"evaluate.{name}.{own}: each run has its own; leave it out")

    def _check_seeds(self) -> None:
        """Refuse invalid seed keys, and values that the seed would overwrite."""
        if not self.seed_keys or not all(isinstance(name, str) for name in self.seed_keys):
            raise ConfigError(f"seed_keys: found {self.seed_keys!r}; give a list of keys such as [seed, data.seed]")
        places = {"common": self.common, "grid": self.grid}
        places |= {f"variants.{label}": keys for label, keys in self.variants.items()}
        for place, keys in places.items():
            for name in keys:
                if name in self.seed_keys:
                    raise ConfigError(f"{place}: {name} is one of seed_keys; give its values as seeds=")
                if name == "output":
                    raise ConfigError(f"{place}: each run has its own output; give the sweep's as the key output")


FOLDER = CONFIGS / "sweep"
#: Keys whose values experiments.run always reads as YAML; string values of other keys are taken literally.
_PARSED = ("data.", "algo.", "correction.", "model.overrides.")
#: Runs of one sweep.
MOST_RUNS = 10_000
_SEEDS = re.compile(r"(\d{1,10})\.\.(\d{1,10})")
_LABEL = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
        label: its name in tables, the same for all seeds.
        point: the values of the grid's keys.
        variant: the label of its variant; empty if there are no variants.
        keys: all keys of its command line except `output`.
    """

    label: str
    point: Mapping[str, Any]
    variant: str
    seed: int
    keys: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """Its path below runs/ and evals/."""
        return f"{self.folder}/seed-{self.seed}"

    @property
    def folder(self) -> str:
        """The label as a folder name."""
        return _LABEL.sub("-", self.label).strip("-")

    def arguments(self, output: Path) -> list[str]:
        """The arguments of experiments.run."""
        return [*(f"{name}={_typed(name, value)}" for name, value in self.keys.items()), f"output={output}"]


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to run; in `runs` those with the same label follow each other, ordered by seed."""

    name: str
    config: SweepConfig
    runs: tuple[Planned, ...]
    folder: Path

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the file."""
        return list(dict.fromkeys(run.label for run in self.runs))

    @property
    def baseline(self) -> str:
        """The label that the others are tested against."""
        return self.config.baseline or self.labels[0]


def names() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(arguments: Sequence[str]) -> Sweep:
    """Read the sweep of a command line.

    Raises:
        ConfigError: there is no such sweep, a key is unknown, or two runs have the same name.
    """
    items = [split(argument) for argument in arguments]
    name, given = dict(items).get("sweep", ""), [item for item in items if item[0] != "sweep"]
    if not items:
        raise ConfigError(f"sweep: missing; give sweep=NAME ({', '.join(names())}), or grid=... and variants=...")
    tree = _file(name) if name else {}
    for item in given:
        _set(tree, *item)
    config = from_tree(SweepConfig, tree)
    stem = Path(name).stem if name else "sweep"
    folder = output_path(config.output) if config.output else Path("sweeps") / stem
    runs = tuple(_runs(config))
    _check_used(config, [item[0] for item in given])
    for run in runs:
        if not FOLDER_NAME.fullmatch(run.folder):
            raise ConfigError(f"variants, grid: '{run.label}' has no letter or digit for a folder name; give another")
    slugs = [run.slug for run in runs]
    twice = next((slug for slug in slugs if slugs.count(slug) > 1), None)
    if twice:
        raise ConfigError(f"variants, grid: two runs would be called {twice}; give them different labels")
    sweep = Sweep(stem, config, runs, folder)
    if config.baseline and config.baseline not in sweep.labels:
        raise ConfigError(f"baseline: no runs '{config.baseline}'; {nearest(config.baseline, sweep.labels)}")
    return sweep


def text(value: Any) -> str:
    """A value of a file as typed on a command line."""
    if value is None or isinstance(value, (bool, list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _typed(name: str, value: Any) -> str:
    """`text`, quoted if a string would be read as something else, such as a number."""
    written = text(value)
    if not isinstance(value, str) or not name.startswith(_PARSED):
        return written
    try:
        same = parse(name, written) == value
    except ConfigError:
        same = False
    return written if same else json.dumps(value, ensure_ascii=False)


def seeds_of(value: Any) -> list[int]:
    """The list of seeds given as [0, 1, 2], 3, or '0..4'.

    Raises:
        ConfigError: anything else, or a seed that is negative or occurs twice.
    """
    match = _SEEDS.fullmatch(value) if isinstance(value, str) else None
    if match and int(match[1]) <= int(match[2]) < int(match[1]) + MOST_RUNS:
        return list(range(int(match[1]), int(match[2]) + 1))
    seeds = [0] if value is None else value if isinstance(value, list) else [value]
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len({*seeds}) < len(seeds):
        raise ConfigError(f"seeds: found {value!r}; give distinct whole numbers as a list such as [0,1,2], or 0..4")
    return list(seeds)


def _file(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"sweep: no sweep '{name}'; {nearest(name, names())} (or give a YAML file)")
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise error.with_key("sweep") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"sweep: {path} must be a mapping of a sweep's keys; --help lists them")
    # A key without a value counts as absent.
    return {name: value for name, value in tree.items() if value is not None}


def _set(tree: dict[str, Any], name: str, value: str) -> None:
    """Set a key=value of the command line: of the sweep, of its grid, of an evaluation, or of every run."""
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
    """Refuse a key of the command line that has no effect because every variant, or the grid, sets it."""
    for name in given:
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
                yield Planned(_label(variant, point, keys), point, str(variant), seed, keys)


def _label(variant: str, point: Mapping[str, Any], keys: Mapping[str, Any]) -> str:
    """The variant and the values of the grid, and a fault on purpose wherever it is given."""
    if keys.get("fault", NONE) != NONE:
        point = {**point, "fault": keys["fault"]}
    named, short = ("algo", "model", "data", "recipe"), [_short(name) for name in point]
    parts = []
    for name, value in point.items():
        own = _short(name) if short.count(_short(name)) == 1 else name
        parts.append(text(value) if name in named else f"{own}={text(value)}")
    return ", ".join(filter(None, [str(variant), *parts])) or "run"


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]

"""The keys of a sweep's file, and what is refused in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upge.errors import ConfigError, nearest
from upge.train.config import key

#: What a folder may be called, on any system.
FOLDER_NAME = re.compile(r"(?!\.+$)[A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class SweepConfig:
    """What a sweep's file says. `common`, `variants` and `grid` hold keys of experiments.run, dotted."""

    title: str = key("", "what the sweep asks, one line")
    common: dict = key({}, "keys of every run; one given on the command line goes here")
    variants: dict = key({}, "label -> keys of the runs under it")
    grid: dict = key({}, "key -> list of values; every combination is run, for every variant")
    seeds: Any = key(None, "list of seeds, or a text such as 0..4; unset = 0")
    seed_keys: list = key(["seed"], "keys that the seed is given to")
    evaluate: dict = key({}, "name -> arguments of experiments.evaluate for every finished run, such as suite: paper")
    choose: dict = key({}, "sweep: another sweep, run first; key: its best value goes to each run; see docs/sweep.md")
    select: dict = key({}, "key: of the grid, whose best value is asked for; measure: by which, a column of runs.csv")
    baseline: str = key("", "label that the others are tested against; empty = the first")
    measures: list = key([], "columns of runs.csv for the table and the tests; empty = those of the evaluations")
    jobs: int = key(0, "runs at once, several on a GPU if need be; 0 = as many as there are GPUs, or else cores")
    gpus_per_run: int = key(1, "GPUs of one run, where there are any; more than 1 starts torchrun")
    output: str = key("", "folder of the sweep; empty = sweeps/NAME")

    def __post_init__(self) -> None:
        for name, entries in (("variants", self.variants), ("evaluate", self.evaluate)):
            for label, keys in entries.items():
                if not isinstance(keys, Mapping):
                    raise ConfigError(f"{name}.{label}: found {keys!r}, expected keys and values below it")
        self._check_evaluations()
        for name, values in self.grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid.{name}: found {values!r}; give a list of values")
        self._check_seeds()
        for name, keys, more in (("choose", ("sweep", "key"), {"group"}), ("select", ("key", "measure"), set())):
            given = getattr(self, name)
            if given and {*given} - more != {*keys}:
                raise ConfigError(f"{name}: found the keys {sorted(given)}; give {' and '.join(keys)}")
        if self.select and self.select["key"] not in self.grid:
            raise ConfigError(f"select.key: {self.select['key']} is not in the grid; {nearest('', self.grid)}")
        if self.jobs < 0 or self.gpus_per_run < 1:
            raise ConfigError(f"jobs={self.jobs}, gpus_per_run={self.gpus_per_run}: give at least 0 and 1")

    def _check_evaluations(self) -> None:
        for name, keys in self.evaluate.items():
            if not FOLDER_NAME.fullmatch(str(name)):
                raise ConfigError(f"evaluate.{name}: give it a name of letters, digits and any of _ . + -")
            for own in {"model", "model.path", "output"} & {*keys}:
                raise ConfigError(f"evaluate.{name}.{own}: is each run's own; leave it out")

    def _check_seeds(self) -> None:
        """Refuses seeds that decide nothing, and values that they would overwrite."""
        if not self.seed_keys or not all(isinstance(name, str) for name in self.seed_keys):
            raise ConfigError(f"seed_keys: found {self.seed_keys!r}; give a list of keys such as [seed, data.seed]")
        places = {"common": self.common, "grid": self.grid}
        places |= {f"variants.{label}": keys for label, keys in self.variants.items()}
        for place, keys in places.items():
            for name in keys:
                if name in self.seed_keys:
                    raise ConfigError(f"{place}: {name} is one of seed_keys; give its values by seeds=")
                if name == "output":
                    raise ConfigError(f"{place}: output is each run's own; give the sweep's by output= beside it")

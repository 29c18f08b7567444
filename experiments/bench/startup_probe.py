"""Runs `experiments.run` of the current folder up to its first step, and records when each part is done.

It records the seconds since the command and the CPU seconds of this process.

python startup_probe.py MARKS BEGUN ARGUMENTS...     MARKS: the file for the records; BEGUN: time of the command
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

AFTER = (
    ("experiments.run.prepare", "prepare", "prepared"),
    ("experiments.run.train", "_models", "trainer"),
    ("upge.rollout", "load", "engine"),
    ("experiments.run.train", "Progress.step", "first step"),
)
"""(module, function, name of the mark when it returns)."""
OLD_MODULES = {"prepare": "experiments.prepare", "_models": "experiments.run", "Progress.step": "experiments.progress"}
"""Modules of these functions in a checkout from before each command was a package."""
LAST = "first step"
"""The mark that ends the run."""


def main(file: str, begun: float, arguments: list[str]) -> int:
    """Run up to the last mark; return the exit code of the run if it ends earlier."""

    def mark(name: str) -> None:
        with open(file, "a", encoding="utf-8") as marks:
            print(json.dumps([name, time.time() - begun, time.process_time()]), file=marks)
        if name == LAST:
            os._exit(0)

    is_old = os.path.isfile(os.path.join("experiments", "run.py"))
    run = importlib.import_module("experiments.run" if is_old else "experiments.run.__main__")
    for module, path, name in AFTER:
        *owners, function = path.split(".")
        place = OLD_MODULES.get(path, module) if is_old else module
        owner = functools.reduce(getattr, owners, importlib.import_module(place))
        setattr(owner, function, _marked(getattr(owner, function), functools.partial(mark, name)))
    sampler: Any = importlib.import_module("upge.rollout.base").Sampler
    sample = sampler.sample

    def watched(self: Any, prompts: Any, n: int, sampling: Any, seeds: Any, arrived: Any = None, *more: Any) -> Any:
        def first(index: int, copy: int, rollout: Any) -> None:
            if not has_rollout:
                has_rollout.append(True)
                mark("first rollout")
            if arrived is not None:
                arrived(index, copy, rollout)

        return sample(self, prompts, n, sampling, seeds, first, *more)

    has_rollout: list[bool] = []
    sampler.sample = watched
    return run.main(arguments)


def _marked(function: Callable, mark: Callable[[], None]) -> Callable:
    @functools.wraps(function)
    def marked(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        mark()
        return result

    return marked


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))

"""Trainers without a model, for tests of the benches: one in a process of its own, one that only pretends to be."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.bench.trainers import ChildError, Connection, StepControl, serve
from upge.errors import ConfigError


def train(job: dict[str, Any], connection: Connection) -> None:
    """Steps of a hundredth of a second; `job["fails"]` says how it ends instead, if not well."""
    print("the child was here", flush=True)
    if job.get("fails") == "users":
        raise ConfigError("key: found 3; give 4")
    if job.get("fails") == "silently":
        os._exit(0)
    done = 0

    @contextmanager
    def compared(word: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        results: dict[str, Any] = {}
        yield results
        results["heard"] = word["gradient"]

    control = StepControl(connection, lambda: {"mean": done / 10}, compared)
    control.begin()
    while True:
        time.sleep(0.01)
        done += 1
        if done == job.get("until"):
            raise ZeroDivisionError("no more\nof this")
        control.stepped({"tokens": 100, "reward": 0.5})


class Pretended:
    """Answers as a child would; `script` has what it says, by word, and is asked with the number of steps so far."""

    def __init__(self, script: Mapping[str, Any]) -> None:
        self.script, self.steps, self.closed, self.words = script, 0, False, []

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True

    def answer(self) -> dict[str, Any]:
        return {"ready": True}

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert not self.closed, "nobody asks a child that was told to end"
        self.words.append(do)
        if do in ("steps", "compare"):
            self.steps += more.get("count", 1)
        said = self.script[do](self.steps) if do in self.script else {}
        if isinstance(said, str):
            raise ChildError(said)
        return dict(said)


class Stage:
    """Starts pretended children, by the names under which a bench starts them."""

    def __init__(self, **scripts: Mapping[str, Any]) -> None:
        self.scripts, self.jobs, self.children = scripts, {}, []

    def __call__(self, name: str, module: str, job: Mapping[str, Any], folder: Path, threads: int) -> Pretended:
        self.jobs[name] = {**job, "module": module, "threads": threads}
        child = Pretended(self.scripts[name.replace("-", "_")])
        self.children.append((name, child))
        return child


if __name__ == "__main__":
    serve(train)

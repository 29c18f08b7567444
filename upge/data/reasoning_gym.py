"""Tasks of the package reasoning-gym, which generates problems and scores answers with its own verifiers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upge.checks import check_fields
from upge.data.splits import Problem, Splits, check_sizes, even_shares, for_evaluation, interleaved
from upge.errors import ConfigError, nearest

#: Share of a task's problems on the evaluation side, by a hash of the prompt.
EVALUATION_SHARE = 0.2

#: Entries per part of a task. The size is fixed because the entries of some tasks depend on it.
PART = 500

_PROGRAM = Path(__file__).with_name("reasoning_gym_server.py")


@dataclass(frozen=True)
class ReasoningGym:
    """Problems of one or more tasks, divided evenly among them. The order interleaves the tasks.

    A hash of a problem's prompt decides which side it is on (`upge.data.splits`). Therefore no training problem of one
    data set is an evaluation problem of another, even with other seeds and sizes. The level is the task.

    `answer` is the whole entry of reasoning-gym as JSON, {"question", "answer", "metadata"}, which the verifier
    "reasoning_gym" reads; metadata.source_dataset names the task. There are no demonstrations, because an entry has an
    answer but no worked solution. Algorithms that need demonstrations need another data set (`Mixture`).

    The prompts do not say how to state the answer. Set model.instruction, such as "\\nPut the final answer in
    \\\\boxed{}.".

    Attributes:
        tasks: names of tasks, or name → settings of its configuration in reasoning-gym, without seed and size.
        train_size, evaluation_size: number of problems on each side, over all tasks. If it does not divide evenly, the
            first tasks get one problem more. A larger size keeps the problems of a smaller one.
        seed: another seed draws other problems.

    Raises:
        ConfigError: the package is missing, a task or setting is unknown, a size is below 1 or (by `load`) more than a
            task has, or a task fails. The message names task and key.
    """

    # Any: settings are checked by `load`, whose messages name the task.
    tasks: Sequence[str] | Mapping[str, Any] = ("chain_sum", "simple_equations", "leg_counting")
    train_size: int = 512
    evaluation_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", (self.tasks,))
        if not isinstance(self.tasks, Mapping):
            object.__setattr__(self, "tasks", tuple(self.tasks))
        check_fields(self)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"data.tasks: expected one or more distinct tasks, found {list(self.tasks)}")
        for name, settings in self._settings().items():
            if not isinstance(settings, Mapping):
                raise ConfigError(f"data.tasks.{name}: found {settings!r}, expected its settings, or {{}} for none")
        check_sizes(self.train_size, self.evaluation_size)

    def load(self) -> Splits:
        """Generate the problems. Equal settings give equal problems in the same order, in every process.

        A child process generates them with a fixed seed for Python's hashes and random numbers, on which some tasks
        depend: all ranks of a run and a resumed run must get the same problems.
        """
        sizes = {"train": self.train_size, "evaluation": self.evaluation_size}
        shares = {side: even_shares(size, len(self.tasks)) for side, size in sizes.items()}
        sides: dict[str, list[list[Problem]]] = {side: [] for side in sizes}
        with _Child() as child:
            known = child.ask("tasks", True)
            for number, (name, settings) in enumerate(self._settings().items()):
                if name not in known:
                    raise ConfigError(f"data.tasks: reasoning-gym has no task '{name}'; {nearest(name, known)}")
                wanted = {side: share[number] for side, share in shares.items()}
                for side, problems in self._task(child, name, settings, wanted).items():
                    sides[side].append(problems)
        return Splits(interleaved(sides["train"]), interleaved(sides["evaluation"]))

    def _settings(self) -> dict[str, Any]:
        """Task → settings, unchecked."""
        if isinstance(self.tasks, Mapping):
            return {name: {} if settings is None else settings for name, settings in self.tasks.items()}
        return {name: {} for name in self.tasks}

    def _task(
        self, child: _Child, name: str, settings: Mapping[str, object], wanted: Mapping[str, int]
    ) -> dict[str, list[Problem]]:
        """Side → problems of a task, as many as `wanted`."""
        known = child.ask("settings", name)
        for key in settings:
            if key not in known:
                raise ConfigError(f"data.tasks.{name}.{key}: the task has no setting '{key}'; {nearest(key, known)}")
        sides: dict[str, list[Problem]] = {side: [] for side in wanted}
        seen: set[str] = set()
        tries = 20 * sum(wanted.values()) + 200
        for number in range(tries):
            if all(len(sides[side]) == size for side, size in wanted.items()):
                return sides
            part, index = divmod(number, PART)
            if index == 0:
                # Tasks add an entry's index to their seed, so consecutive seeds would share entries.
                digest = hashlib.sha256(f"{self.seed}/{name}/{part}".encode()).digest()
                seed = int.from_bytes(digest[:4], "big") >> 1
                task = {"name": name, "settings": dict(settings), "seed": seed, "size": PART}
                child.ask("open", task, f"data.tasks.{name}: reasoning-gym refuses the settings {dict(settings)}")
            entry = child.ask("entry", index, f"data.tasks.{name}: entry {number} failed; leave this task out")
            side = "evaluation" if for_evaluation(entry["prompt"], EVALUATION_SHARE) else "train"
            if entry["prompt"] not in seen and len(sides[side]) < wanted[side]:
                sides[side].append(self._problem(name, number, entry))
            seen.add(entry["prompt"])
        counts = ", ".join(f"{len(sides[side])} of {size} for {side}" for side, size in wanted.items())
        raise ConfigError(
            f"data.tasks.{name}: {tries} entries hold only {len(seen)} different prompts ({counts}); lower "
            "data.train_size and data.evaluation_size, or give the task settings with more variety"
        )

    def _problem(self, name: str, index: int, entry: Mapping[str, str]) -> Problem:
        return Problem(
            id=f"{name}/{self.seed}/{index}",
            prompt=entry["prompt"],
            answer=entry["json"],
            level=name,
            where=f"reasoning-gym, {name}, seed {self.seed}, entry {index}",
            verifier="reasoning_gym",
        )


class _Child:
    """A process that runs reasoning_gym_server.py while the context lasts."""

    def __enter__(self) -> _Child:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError("data: the package reasoning-gym is not installed: pip install 'upge[data]'")
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # -P keeps the program's folder off the import path, because its files have names of packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, request: str, argument: Any, refusal: str = "data") -> Any:  # Any: JSON values
        """The program's reply to a request, see reasoning_gym_server.py.

        Raises:
            ConfigError: the program replied with an error or has ended; the message begins with `refusal`.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({request: argument}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ConfigError(f"{refusal}: the process that makes the problems ended with code {self.process.wait()}")
        reply = json.loads(line)
        if isinstance(reply, dict) and "error" in reply:
            raise ConfigError(f"{refusal}: {reply['error']}")
        return reply

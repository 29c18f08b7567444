"""A program that generates entries of reasoning-gym's tasks on request, for `upge.data.reasoning_gym`.

It imports nothing from upge, so that it starts quickly. Each line of its input is a request as JSON, and each line of
its output is the reply:

- {"tasks": true} → the names of all tasks;
- {"settings": NAME} → the names of a task's settings;
- {"open": {name, settings, seed, size}} → null;
- {"entry": index} → an entry of the task that was opened last.

The reply to a request that fails is {"error": text}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from typing import Any

JSON = Any  # a JSON value


class Server:
    """The task that was opened last.

    Its methods answer the requests; values are JSON.
    """

    def tasks(self, _: bool) -> list[str]:
        """The names of all tasks."""
        return sorted(_tasks())

    def settings(self, name: str) -> list[str]:
        """The names of a task's settings, without those that the caller sets."""
        _, configuration = _tasks()[name]
        return [field.name for field in dataclasses.fields(configuration) if field.name not in ("seed", "size")]

    def open(self, task: dict[str, JSON]) -> None:
        """Open the task for later calls of `entry`."""
        import reasoning_gym

        self.seed = task["seed"]
        self.task = reasoning_gym.create_dataset(task["name"], seed=self.seed, size=task["size"], **task["settings"])

    def entry(self, index: int) -> dict[str, str]:
        """One entry: its prompt, and the whole entry as JSON text."""
        # Some tasks draw not only from their own generator but also from the module's.
        random.seed(f"{self.seed}/{index}")
        entry = self.task[index]
        # Values such as fractions become text. The answers are already texts.
        return {"prompt": entry["question"], "json": json.dumps(entry, default=str)}


def _tasks() -> dict[str, tuple[type, type]]:
    """Task → (class of the data set, class of its settings)."""
    from reasoning_gym.factory import DATASETS

    return DATASETS


def main() -> None:
    """Answer requests until the input ends."""
    # Redirect what tasks print, so that it does not mix with the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    server = Server()
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        try:
            reply = getattr(server, name)(argument)
        except Exception as error:  # a task may raise anything
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()

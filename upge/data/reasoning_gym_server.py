"""A program that makes entries of reasoning-gym's tasks on request, for `upge.data.reasoning_gym`; see there for why.

It imports nothing of upge, so that it starts quickly. Each line of its input is a request as JSON, each line of its
output the reply: {"tasks": true} → the names of all tasks; {"settings": NAME} → the settings of one;
{"open": {name, settings, seed, size}} → null; {"entry": index} → an entry of the task opened last. What goes wrong is
replied as {"error": text}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from typing import Any


class Server:
    """Holds the task opened last."""

    def tasks(self, _: bool) -> list[str]:
        """Names of all tasks."""
        return sorted(_tasks())

    def settings(self, name: str) -> list[str]:
        """What a task can be told, without what its caller decides."""
        _, configuration = _tasks()[name]
        return [field.name for field in dataclasses.fields(configuration) if field.name not in ("seed", "size")]

    def open(self, task: dict[str, Any]) -> None:
        """Makes a task the one that entries are of."""
        import reasoning_gym

        self.seed = task["seed"]
        self.task = reasoning_gym.create_dataset(task["name"], seed=self.seed, size=task["size"], **task["settings"])

    def entry(self, index: int) -> dict[str, Any]:
        """One entry: its prompt, and the whole of it as JSON text."""
        # Some tasks draw from the module's generator beside their own.
        random.seed(f"{self.seed}/{index}")
        entry = self.task[index]
        # Fractions and their kind become text; they are there to be read, the answers are texts already.
        return {"prompt": entry["question"], "json": json.dumps(entry, default=str)}


def _tasks() -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS

    return DATASETS


def main() -> None:
    """Serves until its input ends."""
    # What tasks print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    server = Server()
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        try:
            reply = getattr(server, name)(argument)
        except Exception as error:  # tasks may fail in any way
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()

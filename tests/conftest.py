"""Hooks that hold for all tests."""

from __future__ import annotations

import gc
import signal

import pytest

# A process that a shell started in the background ignores SIGINT, and so do its children: nothing could be interrupted.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


#: Files that take longest, without `test_` and `.py`. Several processes take them first, so that all end together.
LONGEST = (
    *("trains", "run", "plain_trainer", "rollout", "improves", "update", "engine", "sweep", "lora", "elementwise"),
    *("evaluate", "nonfinite", "signals", "ranks", "theory_symbolic", "models", "critic", "learner", "term_gradients"),
    *("diagnose", "logprobs", "optimised", "bad_input", "correction_interplay", "conformance_shipped"),
)


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from going through everything that is imported again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what is marked `soak` unless -m names it, and what is marked `gpu` where there is no CUDA device.

    In a process of pytest-xdist, it also orders the files.
    """
    if "soak" not in config.getoption("markexpr"):
        soaking = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaking)
        items[:] = [item for item in items if item not in soaking]
    if hasattr(config, "workerinput"):
        places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

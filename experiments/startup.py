"""Start-up of a command: silences the libraries' messages and pauses garbage collection while they load."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator


def quiet() -> None:
    """Silences the libraries' informational messages; warnings that concern the user still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collector while libraries are imported and engines start.

    Nearly all objects made there stay alive, and the collector would traverse the million objects of torch,
    transformers, DeepSpeed and vLLM again and again, also because the engines call it themselves. Existing objects are
    frozen for good; garbage made in the block is collected at its end.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()

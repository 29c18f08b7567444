"""The start of a command: fewer messages from the libraries, and no garbage collection while they load."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Iterator


def quiet() -> None:
    """Keeps the libraries' own news out of the output; warnings that concern the user still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|deepspeed\.")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without Python's garbage collector while libraries are imported and engines start, for all that is made stays.

    It would go through the million objects of torch, transformers, DeepSpeed and vLLM again and again, and so would the
    engines, which call it themselves. What is there already is set aside for good; what the block leaves behind is
    collected at its end.
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

"""A run that has used up memory or disk: one message with the keys that help and the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from upge.errors import CapacityError, StorageError, is_out_of_memory
from upge.train.config import RunConfig
from upge.train.files import is_full
from upge.train.folder import RunFolder


@contextmanager
def limits_explained(config: RunConfig, folder: RunFolder) -> Iterator[None]:
    """Turn errors of memory and disk in the block into errors that a user can act on.

    Raises:
        CapacityError: the memory is used up.
        StorageError: a file cannot be written.
    """
    try:
        yield
    except StorageError as error:
        explained = StorageError(f"{error}; {_last_checkpoint(folder)}")
        explained.is_shared = error.is_shared
        raise explained from error
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise CapacityError(_out_of_memory(error, config, folder)) from error
        if is_full(error):
            raise StorageError(f"{error}; {_last_checkpoint(folder)}") from error
        raise


def _out_of_memory(error: BaseException, config: RunConfig, folder: RunFolder) -> str:
    notes = getattr(error, "__notes__", [])
    where = f"in {notes[0]}" if notes else "outside of the updates' micro-batches"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    fixes = [f"optimizer.micro_batch_tokens (now {config.optimizer.micro_batch_tokens})"]
    fixes += [f"rollout.memory_fraction (now {config.rollout.memory_fraction:g}, for vLLM on a GPU)"]
    lower = f"lower {' or '.join(fixes)}"
    if config.model.gradient_checkpointing != "full":
        lower += f", set model.gradient_checkpointing=full (now {config.model.gradient_checkpointing})"
    if config.deepspeed.offload == "none":
        lower += ", or deepspeed.offload=optimizer on a GPU"
    return f"out of memory {where} ({reason}); {lower}; {_last_checkpoint(folder)}"


def _last_checkpoint(folder: RunFolder) -> str:
    steps = folder.checkpoint_steps()
    if not steps:
        return f"there is no checkpoint in {folder.path} yet, so the same command starts again"
    path = folder.checkpoints / folder.tag(steps[-1])
    return f"afterwards the same command with output={folder.path} continues from the last checkpoint, {path}"

"""Reads tables from the Hugging Face hub. Written against the documentation of `datasets`; never run with the hub."""

from __future__ import annotations

from upge.data.files import Record, numbered_records
from upge.errors import ConfigError, DataError

#: What each kind of failure, by the name of its class in `datasets`, is and how it is mended.
_FIXES = {
    "DatasetNotFoundError": "it does not exist, or it is gated or private: ask for access on its page, then log in "
    "with `hf auth login` (`huggingface-cli login` in older versions)",
    "ConnectionError": "the hub cannot be reached; where it can be, download the data set",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set and it is not in the cache; unset it",
    "ValueError": "check data.subset and data.split",
}


def read_hub(name: str, subset: str | None, split: str) -> list[Record]:
    """The rows of one split of a hub data set, downloaded once into the cache of `datasets`.

    Args:
        name: as in `openai/gsm8k`.
        subset: its configuration; None takes the only one.
        split: as in `train`; slices such as `train[:1000]` are understood.

    Raises:
        ConfigError: the package `datasets` is missing.
        DataError: the data set cannot be loaded, or it has no rows; the message says why, and what to do.
    """
    title = f"{name}, {subset}, {split}" if subset else f"{name}, {split}"
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.hub: loading '{name}' needs the package datasets: pip install 'upge[data]' ({error}); or give a "
            "file as data.path"
        ) from error
    try:
        rows = list(datasets.load_dataset(name, subset, split=split))
    except Exception as error:  # downloads, caches and readers of many kinds fail in as many ways
        kind = next((c.__name__ for c in type(error).__mro__ if c.__name__ in _FIXES), None)
        fix = f"; {_FIXES[kind]}" if kind else ""
        said = str(error).strip().splitlines()
        raise DataError(
            f"data.hub: '{title}' could not be loaded ({type(error).__name__}: {said[0] if said else ''}){fix}; or "
            "give a file of it as data.path"
        ) from error
    if not rows:
        raise DataError(f"data.hub: '{title}' has no rows; check data.split")
    return numbered_records(rows, title)

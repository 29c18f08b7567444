"""Dry runs without network: known model sizes instead of models, and checks for a missing tokenizer or hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.config import MODELS, Composed
from upge.data.prompting import TOKENIZER_FILES
from upge.errors import ModelError
from upge.models.loading import read_config

#: Hub name → folder in experiments/models with the model's config.json and nothing else.
KNOWN = {
    "Qwen/Qwen2.5-Math-7B": "qwen2.5-math-7b",
    "Qwen/Qwen2.5-Math-1.5B": "qwen2.5-math-1.5b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
}


def with_known_models(composed: Composed) -> tuple[Composed, list[str]]:
    """Replaces models that cannot be found by the folders of `KNOWN`, and returns a sentence about each.

    Raises:
        ModelError: a model is neither found nor known.
    """
    config, notes = composed.config, []
    for key in ("model", "critic", "reference"):
        section = getattr(config, key)
        folder = _folder(section.path, f"{key}.path", notes)
        config = replace(config, **{key: replace(section, path=folder)})
    return replace(composed, config=config), notes


def _folder(path: str, key: str, notes: list[str]) -> str:
    if path not in KNOWN:
        return path
    try:
        read_config(path)
    except ModelError:
        folder = MODELS / KNOWN[path]
        notes.append(
            f"{key}: '{path}' is not in the local cache and the hub cannot be reached; its sizes are those of "
            f"{folder.relative_to(MODELS.parent.parent)}/config.json, which has neither weights nor tokenizer"
        )
        return str(folder)
    return path


def has_tokenizer(path: str) -> bool:
    """Whether a model that has a configuration also has a tokenizer.

    For a folder this checks the files, because transformers makes an empty tokenizer from a configuration alone.
    """
    if Path(path).is_dir():
        return any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
    from upge.data.prompting import load_tokenizer

    try:
        return load_tokenizer(path) is not None
    except ModelError:
        return False


def is_unreachable(error: BaseException | None) -> bool:
    """Whether the cause of an error is that the hub could not be reached."""
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__
    return False

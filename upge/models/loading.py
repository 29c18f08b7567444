"""Finds a model and its weights by name, before an engine starts."""

from __future__ import annotations

import math
import os
import random
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy
import torch
from safetensors import SafetensorError, safe_open

from upge.errors import ConfigError, ModelError, nearest
from upge.trees import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Number of parameters below which, on a CPU, one thread samples faster than several, and transformers faster than vLLM.
SMALL_MODEL = 5_000_000
#: Layers beyond which a configuration is taken for a mistake: even without weights each takes time and memory.
MOST_LAYERS = 2000

ModelConfig = Any  # a configuration of transformers; its attributes depend on the model


def read_config(model_path: str | Path, overrides: Mapping[str, object] | None = None) -> ModelConfig:
    """The Hugging Face configuration of a local folder or a model of the hub, with `overrides` applied.

    Raises:
        ModelError: there is no such model; the key is `model.path`.
        ConfigError: the model does not have a key of `overrides`; the message names it below `model.overrides`.
    """
    path = str(model_path)
    if path.lower().endswith(".gguf"):
        raise ModelError(
            "the engines load no GGUF files; give them the folder that upge.models.local_path makes of it",
            "model.path",
            path,
        )
    looks_local = path.startswith((".", "~", os.sep)) or path.count("/") != 1
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ModelError("no config.json in this folder; give a folder in Hugging Face format", "model.path", path)
    elif looks_local and path.count("/") != 0:
        raise ModelError(
            "there is no such folder; give a folder in Hugging Face format or the name of a model of the "
            "Hugging Face hub",
            "model.path",
            path,
        )
    from transformers import AutoConfig

    try:
        # Without a connection, the hub's client retries for half a minute.
        is_local = Path(path).is_dir() or not _hub_answers()
        config = AutoConfig.from_pretrained(path, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # a file of the hub or of a user may be wrong in any way
        if Path(path).is_dir():
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(f"its config.json cannot be read: {reason}; fix that file", "model.path", path) from error
        reason = first_line(error)
        raise ModelError(
            f"neither a folder nor a model that can be found here ({reason}); check the name, or download "
            "the model first and give its folder",
            "model.path",
            path,
        ) from error
    config = override(config, overrides or {})
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"its num_hidden_layers is {layers}; give 1 to {MOST_LAYERS} layers", "model.path", path)
    return config


def override(config: ModelConfig, overrides: Mapping[str, object]) -> ModelConfig:
    """Change values of `config` in place and return it.

    The keyword arguments of transformers would silently ignore unknown keys, and `rope_theta`, which is now part of
    `rope_parameters`.

    Raises:
        ConfigError: a key is unknown or a value has another type than the old one.
    """
    for key, value in overrides.items():
        parameters = getattr(config, "rope_parameters", None)
        rope = parameters if isinstance(parameters, dict) else {}
        in_rope = key in rope
        old = rope[key] if in_rope else getattr(config, key, None)
        numbers = isinstance(old, (int, float)) and isinstance(value, (int, float))
        if (
            old is not None
            and isinstance(old, bool) != isinstance(value, bool)
            or not (old is None or numbers or isinstance(value, type(old)))
        ):
            raise ConfigError(f"model.overrides.{key}: found {value!r}, expected a {type(old).__name__} as in {old!r}")
        if in_rope:
            config.rope_parameters = {**rope, key: value}
        elif hasattr(config, key):
            setattr(config, key, value)
        else:
            known = [*config.to_dict(), *rope]
            raise ConfigError(f"model.overrides.{key}: {type(config).__name__} has no such key; {nearest(key, known)}")
    return config


def check_loaded(path: str, loading_info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not match the model. transformers would use random weights.

    `loading_info` is that of `from_pretrained(..., output_loading_info=True)`. (Any: collections of names or tuples.)

    Raises:
        ModelError: tensors are missing, superfluous or of another shape.
    """
    problems = {
        "missing_keys": "of its config.json are missing",
        "unexpected_keys": "do not belong to its config.json",
        "mismatched_keys": "have shapes that do not match its config.json",
    }
    for kind, problem in problems.items():
        names = sorted(str(key) for key in loading_info.get(kind) or ())
        if names:
            raise ModelError(
                f"'{path}': {len(names)} tensors {problem}, the first is {names[0]}; give a complete checkpoint, and "
                "check model.overrides",
                "model.path",
            )


def check_finite(path: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that are NaN or infinite, on which nothing could be trained.

    Raises:
        ModelError: some are; the key is `model.path`.
    """
    for name, tensor in weights:
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"'{path}' has weights that are not finite, the first in {name}; give a model that was saved before "
                "its training failed",
                "model.path",
            )


def check_files(path: str) -> None:
    """Check that the safetensors files of a local model are as long as their headers say; read only the headers.

    Raises:
        ModelError: one is cut or not a safetensors file; the key is `model.path`.
    """
    folder = Path(path).expanduser()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is cut or damaged ({error}); copy it again", "model.path") from error


@contextmanager
def progress_bars_hidden() -> Iterator[None]:
    """Suppress transformers' progress bars of loading and saving in the block."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _hub_answers() -> bool:
    """Whether the hub can be reached. Behind a proxy this is assumed."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


#: There if an NVIDIA driver is loaded.
_NVIDIA_DEVICE, _NVIDIA_DRIVER = Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version")


def has_cuda() -> bool:
    """Whether models run on CUDA; False without a GPU, or if CUDA_VISIBLE_DEVICES is empty or -1.

    Raises:
        ConfigError: there is an NVIDIA GPU that torch cannot use. A run would silently take the CPU.
    """
    if torch.cuda.is_available():
        return True
    if not _NVIDIA_DEVICE.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    driver = re.search(r"\b\d{3}\.[\d.]+", _NVIDIA_DRIVER.read_text()) if _NVIDIA_DRIVER.exists() else None
    shown = f"driver {driver[0]}" if driver else "driver of unknown version"
    fix = "install driver 580 or newer" if torch.version.cuda else "run `make env ENGINE=gpu`"
    raise ConfigError(
        f"this machine has an NVIDIA GPU ({shown}) that torch {torch.__version__} (CUDA {torch.version.cuda}) cannot "
        f"use; {fix}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
    )


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of a name; "auto" is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ConfigError: the name is unknown.
    """
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"rollout.dtype={dtype}: {nearest(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def choose_max_length(max_length: int | None, config: ModelConfig) -> int:
    """The limit on prompt and response together: `max_length`, or the model's number of positions if that is None.

    Raises:
        ConfigError: `max_length` is below 2 or exceeds the model's number of positions.
    """
    limit = config.get_text_config().max_position_embeddings
    if max_length is None:
        return limit
    if max_length < 2:
        raise ConfigError(
            f"max_length={max_length} leaves no room for a prompt and a response; raise "
            "rollout.max_prompt_tokens or rollout.max_response_tokens"
        )
    if max_length > limit:
        raise ConfigError(
            f"prompt and response may have {max_length} tokens together, the model has only {limit} "
            "positions; lower rollout.max_prompt_tokens or rollout.max_response_tokens"
        )
    return max_length


def attention_sizes(config: ModelConfig) -> tuple[int, int, int]:
    """(query heads, key heads, width of a head) of a causal LM. There are as many heads for values as for keys."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    return heads, keys, getattr(text, "head_dim", None) or text.hidden_size // heads


def choose_threads(threads: int | None, table: WeightTable, device: str) -> int | None:
    """Torch's number of threads while sampling; None keeps that of the process.

    On a CPU it is `threads` if that is given, else one for a small model. Two threads of a small model mostly wait for
    each other: with 1M parameters, one thread sampled 11k tokens/s with either engine, two sampled 1.5k (vLLM) and 3k
    (transformers) on two busy cores.

    Raises:
        ConfigError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"rollout.threads={threads}: must be at least 1, or null to let the model's size decide")
    if device != "cpu" or threads is not None:
        return threads if device == "cpu" else None
    return 1 if table.count() < SMALL_MODEL else None


def too_small_for_vllm(config: ModelConfig) -> str | None:
    """Why transformers samples this model faster than vLLM on a CPU, as a clause, or None.

    With 1M parameters a step of vLLM is mostly bookkeeping: transformers sampled 1.4 times as many tokens per second
    (256 responses to each of 8 prompts, one thread, idle machine), and it starts in a fraction of a second.
    """
    with random_state_kept():
        count = WeightTable.of_config(config).count()
    if count >= SMALL_MODEL:
        return None
    return f"it samples {count / 1e6:.1f}M parameters faster on a CPU than vLLM does"


@dataclass(frozen=True)
class WeightTable:
    """The weights of a model by Hugging Face name.

    Attributes:
        shapes: name → shape, including tied names.
        source: name → the name under which the engine loads the weight. Tied names share one.
    """

    shapes: dict[str, tuple[int, ...]]
    source: dict[str, str]

    def count(self) -> int:
        """The number of parameters, tied ones counted once."""
        return sum(math.prod(self.shapes[name]) for name in set(self.source.values()))

    @staticmethod
    def of_model(model: torch.nn.Module) -> WeightTable:
        """The table of a transformers model, which may be on the meta device."""
        shapes: dict[str, tuple[int, ...]] = {}
        source: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(parameter.shape)
            source[name] = first.setdefault(id(parameter), name)
        return WeightTable(shapes, source)

    @staticmethod
    def of_config(config: ModelConfig) -> WeightTable:
        """The table of the causal language model of `config`, without allocating the model."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
        return WeightTable.of_model(model)

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `weights` under their source names, each tied group once.

        Raises:
            ModelError: a name is unknown or given twice, a shape is wrong, or weights are missing.
        """
        seen: set[str] = set()
        loaded: set[str] = set()
        for name, tensor in weights:
            if name not in self.shapes:
                raise ModelError(
                    f"weight '{name}' does not belong to the model at model.path; {nearest(name, self.shapes)}"
                )
            if name in seen:
                raise ModelError(f"weight '{name}' was given twice; give every weight once")
            if tuple(tensor.shape) != self.shapes[name]:
                raise ModelError(
                    f"weight '{name}' has shape {tuple(tensor.shape)}, the model at model.path has "
                    f"{self.shapes[name]}; is a sharded parameter not gathered?"
                )
            seen.add(name)
            if self.source[name] not in loaded:
                loaded.add(self.source[name])
                yield self.source[name], tensor.detach()
        missing = sorted(set(self.source.values()) - loaded)
        if missing:
            wanted = len(set(self.source.values()))
            raise ModelError(
                f"{len(missing)} of {wanted} weights are missing, '{missing[0]}' the first; give all "
                "weights of the model at model.path"
            )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (including CUDA) at the end of the block."""
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)

"""Finding a model and knowing its weights by name: what both engines need before they start."""

from __future__ import annotations

import math
import os
import random
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy
import torch

from upge.errors import ConfigError, ModelError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Parameters below which, on a CPU, one thread samples faster than several, and transformers faster than vLLM.
SMALL_MODEL = 5_000_000


def read_config(model_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """The Hugging Face configuration of a local folder or a cached model, with `overrides` applied.

    Raises ModelError naming `model.path`, ConfigError naming a key of `model.overrides` that the model does not have.
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
        # Without a connection the hub's client repeats its attempts for half a minute before it gives up.
        config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir() or not _hub_answers())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"neither a folder nor a model that can be found here ({reason}); check the name, or download "
            "the model first and give its folder",
            "model.path",
            path,
        ) from error
    return override(config, overrides or {})


def override(config: Any, overrides: Mapping[str, Any]) -> Any:
    """`config` with values changed, in place; transformers' own keyword arguments would ignore an unknown key, and
    `rope_theta`, which lives inside `rope_parameters` now, without a word."""
    for key, value in overrides.items():
        rope = getattr(config, "rope_parameters", None)
        in_rope = isinstance(rope, dict) and key in rope
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
            known = [*config.to_dict(), *(rope or {})]
            raise ConfigError(f"model.overrides.{key}: {type(config).__name__} has none such; {nearest(key, known)}")
    return config


def check_loaded(path: str, found: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that does not fill the model: transformers would go on with random weights.

    Args:
        found: what `from_pretrained(..., output_loading_info=True)` says.

    Raises:
        ModelError: tensors are missing, superfluous or of another shape.
    """
    kinds = {"lacks": "missing_keys", "has superfluous": "unexpected_keys", "misfits": "mismatched_keys"}
    for kind, keys in kinds.items():
        names = sorted(str(key) for key in found.get(keys) or ())
        if names:
            raise ModelError(
                f"'{path}' {kind} {len(names)} tensors of its config.json, the first is {names[0]}; give a complete "
                "checkpoint, and check model.overrides",
                "model.path",
            )


def _hub_answers() -> bool:
    """Whether a connection to the hub can be made; taken for granted where a proxy makes it."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """The torch dtype of a name; "auto" is float32 on a CPU and bfloat16 on a GPU. Raises ConfigError."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"rollout.dtype={dtype}: {nearest(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def choose_max_length(max_length: int | None, config: Any) -> int:
    """The most tokens of prompt and response together: as asked, at most what the model was made for."""
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


def choose_threads(threads: int | None, table: WeightTable, device: str) -> int | None:
    """Torch's threads while sampling: as asked, else one for a small model on a CPU, else None for the process's own.

    Two threads share so little work in a small model that they mostly wait for each other: with 1M parameters one
    thread made 11k tokens/s with either engine, two made 1.5k (vLLM) and 3k (transformers) on two busy cores.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"rollout.threads={threads}: must be at least 1, or null to let the model's size decide")
    if device != "cpu" or threads is not None:
        return threads if device == "cpu" else None
    return 1 if table.count() < SMALL_MODEL else None


def too_small_for_vllm(config: Any) -> str | None:
    """Why a model had better be sampled without vLLM on a CPU, as half a sentence; None if it had not.

    With 1M parameters vLLM's step is mostly bookkeeping: transformers made 1.4 times as many tokens a second (256
    responses of 8 prompts each, one thread, nothing else running), and starts in a fraction of a second.
    """
    with random_state_kept():
        count = WeightTable.of_config(config).count()
    if count >= SMALL_MODEL:
        return None
    return f"it samples {count / 1e6:.1f}M parameters faster on a CPU than vLLM does"


@dataclass(frozen=True)
class WeightTable:
    """The weights of a model by Hugging Face name.

    shapes: the shape of every name, tied names included.
    source: for each name the name under which the engine wants it; several names share one where weights are tied.
    """

    shapes: dict[str, tuple[int, ...]]
    source: dict[str, str]

    def count(self) -> int:
        """The number of parameters, tied ones counted once."""
        return sum(math.prod(self.shapes[name]) for name in set(self.source.values()))

    @staticmethod
    def of_model(model: torch.nn.Module) -> WeightTable:
        """The table of a transformers model; one on the meta device will do."""
        shapes, source, first = {}, {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(parameter.shape)
            source[name] = first.setdefault(id(parameter), name)
        return WeightTable(shapes, source)

    @staticmethod
    def of_config(config: Any) -> WeightTable:
        """The table of the causal language model that `config` describes, without allocating it."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return WeightTable.of_model(model)

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass `weights` on, each tied group once under its source name. Raises ModelError unless they are complete."""
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
    """Put the random state of python, numpy and torch (CUDA included) back on leaving."""
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

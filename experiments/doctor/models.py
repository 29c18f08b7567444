"""The models of a check-up: the chosen one with its own or random weights, and a small one like it."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.doctor.rows import Context, Row, Verdict
from upge.models.loading import progress_bars_hidden, random_state_kept, read_config
from upge.train.config import ModelConfig

#: For the comparison with the CPU, a model with more parameters than this is replaced by a random one with two layers,
#: a smaller vocabulary and a narrower MLP, but the same heads and hidden size.
LARGEST_COMPARED = 20_000_000
_LAYERS, _VOCABULARY, _INNER = 2, 2048, 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def has_weights(model: ModelConfig) -> bool:
    """False for a folder with a config.json and no weights. A name of the hub is assumed to have them."""
    folder = Path(model.path)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def with_weights(context: Context) -> ModelConfig:
    """The chosen model; with random weights if they are asked for, or if it has none. All ranks call it."""
    model = context.run.model
    if not context.config.random and has_weights(model):
        return model
    config = read_config(model.path, model.overrides)
    return saved_random(config, context, "model")


def small(context: Context) -> ModelConfig:
    """The chosen model if it is small, else a random one like it. All ranks call it."""
    model = context.run.model
    assert context.shape is not None
    if context.shape.parameters <= LARGEST_COMPARED:
        return model
    config = copy.deepcopy(read_config(model.path, model.overrides))
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, _LAYERS)
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    text.intermediate_size = min(text.intermediate_size, _INNER)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    # They are token ids of the larger vocabulary.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return saved_random(config, context, "small")


def saved_random(config: Any, context: Context, name: str) -> ModelConfig:
    """A model with random weights, written by one rank of each machine. All ranks call it."""
    from transformers import AutoModelForCausalLM

    model, world, folder = context.run.model, context.world, context.scratch / name
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with random_state_kept(), torch.device(world.device), progress_bars_hidden():
            torch.manual_seed(context.run.seed)
            made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype), trust_remote_code=False)
            made.save_pretrained(folder)
        del made
        gc.collect()
    # After this no rank reads an unfinished model.
    context.gather(None)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(model, path=str(folder), overrides={})


def described(context: Context, given: ModelConfig, name: str) -> Iterator[Row]:
    """The row of the model; `given` and `name` are what the command line asks for."""
    shape, model = context.shape, context.run.model
    assert shape is not None
    origin = f"{name}, random weights" if model.path != given.path else name
    details: Mapping[str, Any] = {"path": given.path, "parameters": shape.parameters, "dtype": model.dtype}
    yield Row("model", Verdict.OK, f"{origin}: {shape.size} parameters, {model.dtype}", details=details)

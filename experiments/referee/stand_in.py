"""Stand-ins for what a trainer's loss method reads: the trainer itself, its accelerator, its arguments and its model.

The methods that are judged are those of the framework, called on an object of its own class whose constructor did not
run. Attributes that the tables below do not name are None.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.referee.protocol import LIMIT, Layout, Micro


class Bag(SimpleNamespace):
    """Attributes, None where none was given; also with `get`, as a configuration."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute, or the default."""
        return self.__dict__.get(name, default)


class Accelerator(Bag):
    """One of `num_processes` processes. What it gathers is its own, which only metrics read."""

    device = torch.device("cpu")
    sync_gradients = True
    is_main_process = True
    process_index = 0

    def gather(self, value: Any) -> Any:
        """The value of this process, as a vector."""
        return value.reshape(-1) if isinstance(value, Tensor) and value.dim() == 0 else value

    gather_for_metrics = gather

    def reduce(self, value: Tensor, reduction: str = "sum") -> Tensor:
        """The value of this process."""
        return value

    def unwrap_model(self, model: nn.Module, **options: Any) -> nn.Module:
        """The model."""
        return model

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Float64 throughout."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, **options: Any) -> None:
        """The backward pass, without a factor: transformers' trainer sets up its accelerator with one step."""
        loss.backward()


class TwoTokenModel(nn.Module):
    """A model whose logits [b, 1 + T, 2] are those of `Micro.logits`, after a prompt of one token.

    Attributes:
        micro: what the next forward pass returns the log-probs of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.micro: Micro | None = None
        self.config = Bag(_attn_implementation="eager", is_encoder_decoder=False)
        self.warnings_issued: dict[str, bool] = {}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        """What causal language models of transformers return, and what TRL's fused output head adds to it."""
        assert self.micro is not None
        logits = self.micro.logits
        logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1)
        mask = torch.zeros_like(input_ids, dtype=torch.bool) if labels is None else labels != -100
        logprobs = torch.cat([torch.zeros_like(logits[:, :1, 0]), self.micro.logprobs], dim=1)
        outputs = Bag(
            logits=logits,
            log_probs=torch.where(mask, logprobs, 0.0),
            entropy=torch.zeros_like(logprobs),
            label_mask=mask,
            is_top1=mask.long(),
        )
        if labels is not None and not options.get("fused_lm_head"):
            from transformers.loss.loss_utils import ForCausalLMLoss

            items = options.get("num_items_in_batch")
            outputs.loss = ForCausalLMLoss(logits, labels, vocab_size=2, num_items_in_batch=items)
        return _Outputs(outputs)


class _Outputs(dict):
    """Outputs that can be read as attributes and as a dictionary."""

    def __init__(self, outputs: Bag) -> None:
        super().__init__(outputs.__dict__)
        self.__dict__ = outputs.__dict__

    def __getattr__(self, name: str) -> Any:
        return None


def trainer(cls: type, layout: Layout, model: nn.Module, arguments: dict[str, Any], **attributes: Any) -> Any:
    """An object of the trainer's class whose constructor did not run.

    Args:
        arguments: of the training arguments that the method reads.
        attributes: of the trainer itself.
    """
    arguments = {
        "gradient_accumulation_steps": layout.micro_batches,
        "steps_per_generation": layout.generation or layout.micro_batches,
        "n_gpu": 1,
        "report_to": [],
        "average_tokens_across_devices": True,
        "max_completion_length": LIMIT,
        "world_size": layout.ranks,
        **arguments,
    }
    common: dict[str, Any] = {
        "args": Bag(**arguments),
        "accelerator": Accelerator(num_processes=layout.ranks),
        "model": model.train(),
        "state": Bag(global_step=0, num_input_tokens_seen=0),
        "current_gradient_accumulation_steps": layout.micro_batches,
        "max_completion_length": LIMIT,
        "num_iterations": 1,
        "temperature": 1.0,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "model_kwarg_keys": {"input_ids", "attention_mask", "logits_to_keep", "labels"},
        "num_virtual_tokens": 0,
        "_step": 0,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "_current_train_step_time": 0.0,
        "_metrics": _Metrics(),
        "_logs": defaultdict(lambda: defaultdict(list)),
        "compute_loss_context_manager": contextlib.nullcontext,
        "maybe_activation_offload_context": contextlib.nullcontext(),
        "get_tp_size": lambda: 1,
        "_prepare_inputs": lambda inputs: inputs,
        **attributes,
    }
    own = type(cls.__name__, (cls,), {"__getattr__": _none})
    made = object.__new__(own)
    made.__dict__.update(common)
    return made


def _none(self: Any, name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


class _Metrics(defaultdict):
    """Metrics by mode and name, or by name alone, as older versions have them."""

    def __init__(self) -> None:
        super().__init__(_ListOrTable)


class _ListOrTable(defaultdict):
    """A table of lists that can also be appended to."""

    def __init__(self) -> None:
        super().__init__(list)

    def append(self, value: Any) -> None:
        """Drop the value."""

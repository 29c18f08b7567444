"""LoRA adapters of a causal LM through PEFT: adding them in place, disabling, merging and saving them.

An adapted layer computes W x + (alpha / rank) · B A x (arXiv 2106.09685) with W fixed. B is zero at first, so the
policy starts as the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from upge.errors import ConfigError, nearest
from upge.models.loading import random_state_kept
from upge.train.config import LoraConfig
from upge.train.prompt_order import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: PEFT's name of the only adapter.
_NAME = "default"
_TARGETS = "model.lora.target_modules"


class Weight(NamedTuple):
    """A weight of the base model, under its Hugging Face name, and the adapter that is added to it.

    Attributes:
        parameter: W, partitioned or not.
        adapter: (A, B), or None if the weight has no adapter.
        scale: alpha / rank.
    """

    name: str
    parameter: nn.Parameter
    adapter: tuple[nn.Parameter, nn.Parameter] | None = None
    scale: float = 0.0

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parameters that must be gathered before `merged`."""
        return [self.parameter, *(self.adapter or ())]

    @property
    def merging_bytes(self) -> int:
        """The peak memory of `merged` in bytes: the float32 sum, and for other dtypes also a float32 copy of W."""
        if self.adapter is None:
            return 0
        return (4 if self.parameter.dtype == torch.float32 else 8) * self.parameter.numel()

    def merged(self) -> Tensor:
        """W + scale · B·A in W's dtype; the sum is computed in at least float32."""
        weight = self.parameter.detach()
        if self.adapter is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (part.detach().to(wide) for part in self.adapter)
        return torch.addmm(weight.to(wide), b, a, alpha=self.scale).to(weight.dtype)


class Adapter:
    """Adapters in the linear layers of `network`, which is changed in place: only the adapters then require gradients.

    Dropout applies only to passes with gradient, so that log-probs of the same policy can be compared.

    Args:
        network: the causal LM, before or after DeepSpeed has partitioned it.
        config: rank, scale, dropout and target modules; the rank is above 0.
        seed: for the initial values of A and for dropout.

    Raises:
        ConfigError: a target module is not a linear layer below the output embedding, or PEFT is not installed.
    """

    def __init__(self, network: PreTrainedModel, config: LoraConfig, seed: int = 0) -> None:
        peft = _peft()
        targets = target_modules(network, config)
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with random_state_kept(), warnings.catch_warnings():
            # PEFT warns that an adapter could change tied weights, but embeddings get no adapter.
            warnings.simplefilter("ignore")
            torch.manual_seed(stream_seed("adapter", seed))
            self._peft: Any = peft.get_peft_model(network, settings, autocast_adapter_dtype=False)
        self._network, self._seed = network, seed
        # Any: layers of PEFT, whose parts are not typed.
        self._layers: dict[str, Any] = {
            name: module for name, module in network.named_modules() if isinstance(module, peft.tuners.lora.Linear)
        }
        self._dropouts = [layer.lora_dropout[_NAME] for layer in self._layers.values()] if config.dropout else []

    def weights(self) -> list[Weight]:
        """The base model's weights under their Hugging Face names, in its order, with their adapters."""
        adapters = {f"{name}.base_layer.weight": layer for name, layer in self._layers.items()}
        weights = []
        for name, parameter in self._network.named_parameters():
            if ".lora_" in name:
                continue
            plain, layer = name.replace(".base_layer.", "."), adapters.get(name)
            if layer is None:
                weights.append(Weight(plain, parameter))
            else:
                pair = (layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight)
                weights.append(Weight(plain, parameter, pair, layer.scaling[_NAME]))
        return weights

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapters' parameters under their names in the network."""
        return [(name, p) for name, p in self._network.named_parameters() if ".lora_" in name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapters in the block, so that the network is the base model."""
        with self._peft.disable_adapter():
            yield

    @contextmanager
    def dropout(self, *place: int) -> Iterator[None]:
        """Enable dropout in passes with gradient; its random numbers follow from the seed and from `place`."""
        if not self._dropouts:
            yield
            return
        for module in self._dropouts:
            module.train(torch.is_grad_enabled())
        with random_state_kept():
            torch.manual_seed(stream_seed("dropout", self._seed, *place))
            yield

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the adapter in PEFT's format; `weights` are whole tensors under the names of `parameters`."""
        state = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
        self._peft.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def target_modules(network: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The names of the layers that get adapters, as PEFT takes them: the last parts of the layers' names.

    Raises:
        ConfigError: no linear layer below the output embedding has a given name.
    """
    trunk = network.base_model
    known = {name.rpartition(".")[2] for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    for name in config.target_modules:
        if name not in known:
            fix = f"{nearest(str(name), known)} (the linear layers below the output embedding)"
            raise ConfigError(f"found {name!r}, but no linear layer has this name; {fix}", _TARGETS)
    return sorted(set(config.target_modules) or known)


def planned_weights(network: PreTrainedModel, config: LoraConfig) -> list[Weight]:
    """What `Adapter.weights` would return, without changing `network`; the adapters have no data.

    Raises:
        ConfigError: as for `target_modules`.
    """
    targets = set(target_modules(network, config)) if config.rank else set()
    adapted = {
        module.weight: module
        for name, module in network.base_model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    }
    weights = []
    for name, parameter in network.named_parameters():
        if (layer := adapted.get(parameter)) is None:
            weights.append(Weight(name, parameter))
        else:
            sizes = (config.rank, layer.in_features), (layer.out_features, config.rank)
            a, b = (nn.Parameter(parameter.new_empty(size, device="meta")) for size in sizes)
            weights.append(Weight(name, parameter, (a, b), config.alpha / config.rank))
    return weights


def _peft() -> Any:
    """The package `peft`."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "LoRA needs PEFT; run `pip install peft`, or set model.lora.rank=0", "model.lora.rank"
        ) from error
    return peft

"""The sizes of a model that determine its memory, from its configuration alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from upge.errors import ModelError
from upge.models.loading import WeightTable, attention_sizes, random_state_kept
from upge.train.config import LoraConfig

#: All weights are trained.
NO_LORA = LoraConfig()


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that determine its memory.

    Attributes:
        parameters: number of parameters of the whole model, tied ones counted once.
        largest_layer: parameters of the largest single module, usually an embedding.
        output: parameters of the output embedding; 0 if it is tied to the input embedding.
        layers, hidden, query, key, inner, vocabulary: the number of layers, and the widths of the residual stream, of
            all query heads, of all key heads (as many for values), of the MLP and of the output.
        head: width of one head.
        itemsize: bytes of a weight, and of an activation.
        norms: norms over the residual stream in a layer.
        has_head_norms: whether queries and keys have a norm, as in Qwen3.
        norms_in_float32: whether a norm multiplies with its weight in float32, as in Gemma.
        gathered: bytes of the largest bucket in which the trainer gathers weights for the sampler.
        adapter: parameters of its LoRA adapters; 0 = all parameters are trained.
        merging: bytes that merging the largest adapted weight takes.
    """

    parameters: int
    largest_layer: int
    output: int
    layers: int
    hidden: int
    query: int
    key: int
    inner: int
    vocabulary: int
    head: int
    itemsize: int
    norms: int
    has_head_norms: bool
    norms_in_float32: bool
    gathered: int
    adapter: int = 0
    merging: int = 0

    @classmethod
    def of(cls, config: Any, dtype: str, lora: LoraConfig = NO_LORA) -> ModelShape:
        """The shape of the causal LM that a Hugging Face configuration describes, in `dtype`.

        Raises:
            ModelError: the trainer cannot run this architecture, or the sizes do not form a model.
            ConfigError: `lora` does not fit the model.
        """
        from transformers import AutoModelForCausalLM

        from upge.train.adapter import planned_weights
        from upge.train.engine import buckets
        from upge.train.packed_attention import check_supported

        try:
            with random_state_kept(), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # sizes that contradict each other fail anywhere in a model's code
            raise ModelError(
                f"model.path: no model can be made of its config.json ({type(error).__name__}: {error}); check its "
                "sizes, and those of model.overrides"
            ) from error
        model.to(getattr(torch, dtype)).tie_weights()
        check_supported(model)
        table, text = WeightTable.of_model(model), config.get_text_config()
        own: Counter[str] = Counter()
        for name in set(table.source.values()):
            own[name.rpartition(".")[0]] += math.prod(table.shapes[name])
        heads, keys, size = attention_sizes(config)
        weights = planned_weights(model, lora)
        has_head_norms = any(name.endswith(".q_norm.weight") for name in table.shapes)
        return cls(
            parameters=table.count(),
            largest_layer=max(own.values()),
            output=own["lm_head"],
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            query=heads * size,
            key=keys * size,
            inner=text.intermediate_size,
            vocabulary=text.vocab_size,
            head=size,
            itemsize=getattr(torch, dtype).itemsize,
            norms=sum(".layers.0." in name and "norm" in name for name in table.shapes) - 2 * has_head_norms,
            has_head_norms=has_head_norms,
            norms_in_float32=text.model_type.startswith("gemma"),
            gathered=max(sum(p.nbytes for weight in bucket for p in weight.parts) for bucket in buckets(weights)),
            adapter=sum(p.numel() for weight in weights for p in weight.adapter or ()),
            merging=max((weight.merging_bytes for weight in weights), default=0),
        )

    @property
    def size(self) -> str:
        """The number of parameters in readable form, such as 7.62 B."""
        for unit, letter in ((1e9, "B"), (1e6, "M")):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.3g} {letter}"
        return f"{self.parameters:,}"

    @property
    def trunk(self) -> ModelShape:
        """The same model without its output embedding and adapters, as a critic has it."""
        return replace(self, parameters=self.parameters - self.output, output=0, adapter=0, merging=0)

    def of_engine(self, ranks: int) -> ModelShape:
        """The part of one of an engine's ranks (`rollout.tensor_parallel`): its weights, and the heads of its cache."""
        return replace(self, parameters=math.ceil(self.parameters / ranks), key=max(self.key // ranks, self.head))

    @property
    def trained(self) -> int:
        """The number of parameters that have gradients and optimizer states."""
        return self.adapter or self.parameters

    @property
    def weights(self) -> int:
        """Bytes of the whole model's weights."""
        return self.parameters * self.itemsize

    @property
    def engine_layer(self) -> int:
        """Bytes of vLLM's largest layer; it joins two matrices of the MLP into one."""
        return max(self.largest_layer, 2 * self.inner * self.hidden) * self.itemsize

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values that a token takes in an engine's cache."""
        return 2 * self.layers * self.key * self.itemsize

    @property
    def kept_per_token(self) -> int:
        """Bytes per token that one layer stores for the backward pass.

        They are its input and two sums, its norms (in float32 internally), query, key, value and output of the
        attention, and four rows of the MLP, as in Qwen, Llama and Gemma.
        """
        rows = (4 if self.norms_in_float32 else 3) if self.itemsize == 2 else 2
        heads = rows * (self.query + self.key) if self.has_head_norms else 0
        attention = 2 * self.query + 2 * self.key
        return ((3 + rows * self.norms) * self.hidden + heads + attention + 4 * self.inner) * self.itemsize

    @property
    def products_per_token(self) -> int:
        """Bytes per token that one layer stores with selective checkpointing.

        They are its input, query, key, value and output of the attention before and after its projection, and two rows
        of the MLP; with adapters also the MLP's output.
        """
        return (
            (3 if self.adapter else 2) * self.hidden + 2 * self.query + 2 * self.key + 2 * self.inner
        ) * self.itemsize

    @property
    def gradients_per_token(self) -> int:
        """Bytes per token of the gradients inside one layer at its widest point: three rows of the MLP."""
        return 3 * self.inner * self.itemsize

"""A Hugging Face causal LM on packed rows: log-probs, a loss whose gradient the head computes, or values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upge.logprobs import CoefficientFunction, Output, token_logprobs, token_loss, token_score_norms
from upge.train.packed_attention import prepare
from upge.train.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(NamedTuple):
    """A loss whose gradient the head computes in its forward pass; the fields are those of `token_loss`."""

    coefficients: CoefficientFunction
    entropy_gradient: bool = False
    whole: bool = False
    candidates: bool = False
    others: Mapping[str, Output] | None = None


class LogprobHead(nn.Module):
    """Hidden states → log-probs, with another module's output embedding that does not become a submodule of this one.

    Under ZeRO-3 the output embedding is gathered for this module: reading the parameter in its forward makes it an
    external parameter of the module, which is gathered again before the head's backward and released right after.
    `chunk_size` is as for `PackedPolicy`.
    """

    def __init__(self, output: nn.Module, chunk_size: int | None = None) -> None:
        super().__init__()
        self._output, self.chunk_size = (output,), chunk_size

    def forward(
        self,
        hidden: Float[Tensor, "n D"],
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        objective: Objective | None = None,
        score_norms: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """The result of `upge.logprobs.token_logprobs`: (logprobs [n], entropies [n] or None).

        With an objective, the result of `token_loss`: (loss, logprobs [n], entropies [n]). With `score_norms`, the
        result of `token_score_norms` in a tuple.
        """
        output: Any = self._output[0]  # a linear layer of some kind
        bias = getattr(output, "bias", None)
        common: dict[str, Any] = {"bias": bias, "temperature": temperature, "chunk_size": self.chunk_size}
        if score_norms:
            return (token_score_norms(hidden, output.weight, targets, **common),)
        if objective is None:
            return token_logprobs(hidden, output.weight, targets, entropy=entropy, **common)
        others = {n: one.with_default(output.weight, bias) for n, one in (objective.others or {}).items()}
        return token_loss(hidden, output.weight, targets, **objective._replace(others=others)._asdict(), **common)


class PackedPolicy(nn.Module):
    """A Hugging Face causal LM that maps a packed batch to the log-probs of its response tokens.

    The model is `self.model`, so its parameters are named "model." + their Hugging Face names. Its attention is
    replaced in place: from then on the model runs packed rows only and raises ModelError for anything else.

    Args:
        model: the causal LM, on any device, before or after DeepSpeed has partitioned it.
        chunk_size: tokens whose logits exist at the same time; default by device and vocabulary.

    Raises:
        ModelError: the architecture's attention or logits cannot be reproduced here.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int | None = None) -> None:
        super().__init__()
        prepare(model)
        self.model = model
        self.head = LogprobHead(cast(nn.Module, model.get_output_embeddings()), chunk_size)

    def forward(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        entropy: bool = False,
        objective: Objective | None = None,
        states: bool = False,
        score_norms: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Log-probs [n] of the response tokens in packed order (`batch.pad` makes [B, T]), and entropies [n] or None.

        With an objective the result is (loss, logprobs, entropies), of which only the loss carries a gradient. With
        `states` it is a tuple of only the hidden states [n, D] before the response tokens; with `score_norms` a tuple
        of only the squared norms [n] of the tokens' scores, without gradient.

        The results of a batch without response tokens are still connected to every parameter.
        """
        hidden = predicting_states(self.model.base_model, batch)
        if states:
            return (hidden,)
        return self.head(hidden, batch.targets, temperature, entropy, objective, score_norms)


def predicting_states(trunk: nn.Module, batch: PackedBatch) -> Float[Tensor, "n D"]:
    """The trunk's last hidden state before each response token, [n, D]: the one that predicts the token."""
    longest = max(batch.lengths)
    output = trunk(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
        sequence_lengths=batch.lengths,
        sharing=batch.sharing,
    )
    return output.last_hidden_state[0].index_select(0, batch.predictors)


class ValueHead(nn.Linear):
    """v = w·h + b, initialized to zero.

    With values of zero the first returns and advantages depend only on the rewards; a random head would add a bias as
    large as its values. The original code for fine-tuning language models with rewards does the same
    (arXiv 1909.08593, reproduced in arXiv 2403.17031). With one output there is no symmetry to break: w learns from
    the first update on, the trunk from the second.

    The parameters have the backbone's dtype. The product is computed in at least float32, because half precision would
    round the values to two or three digits.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(width, 1, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        """Values [n] of hidden states [n, D]."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(wide), self.weight.to(wide), self.bias.to(wide))[:, 0]


class PackedValue(nn.Module):
    """The trunk of a Hugging Face causal LM with a value head: a packed batch → the values of its states.

    Args:
        model: the causal LM, before or after DeepSpeed has partitioned it. Its attention is replaced in place, and its
            output embedding is dropped.
        device: the head's device.

    Raises:
        ModelError: the architecture's attention or logits cannot be reproduced here.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | str) -> None:
        super().__init__()
        prepare(model)
        output = cast(nn.Linear, model.get_output_embeddings())
        self.trunk = model.base_model
        self.head = ValueHead(output.in_features, output.weight.dtype, device)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "n"]:
        """The value [n] of the state before each response token, in packed order.

        A batch without response tokens gives an empty result that is still connected to every parameter.
        """
        return self.head(predicting_states(self.trunk, batch))

"""A Hugging Face causal LM over packed rows: log-probs, or a loss whose gradient the head makes on the way."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from upge.logprobs import CoefficientFunction, token_logprobs, token_loss
from upge.train.packed_attention import prepare
from upge.train.packing import PackedBatch


class Objective(NamedTuple):
    """A loss for the head, so that it makes its gradient on the way; fields as for `upge.logprobs.token_loss`."""

    coefficients: CoefficientFunction
    entropy_gradient: bool = False
    whole: bool = False


class LogprobHead(nn.Module):
    """Hidden states → log-probs with another module's output embedding, which is not made a submodule of this one.

    Under ZeRO-3 this module is what the output embedding is gathered for: reading the parameter in its forward makes
    it an external parameter of this module, gathered again before the head's backward and released right after it.
    """

    def __init__(self, output: nn.Module, chunk_size: int | None = None) -> None:
        super().__init__()
        self._output = (output,)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden: Float[Tensor, "n D"],
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        objective: Objective | None = None,
    ) -> tuple[Tensor, ...]:
        """(logprobs [n], entropies [n] or None) as `upge.logprobs.token_logprobs` gives them; with an objective
        (loss, logprobs [n], entropies [n]) of `token_loss`."""
        output = self._output[0]
        common = {
            "bias": getattr(output, "bias", None),
            "temperature": temperature,
            "chunk_size": self.chunk_size,
        }
        if objective is None:
            return token_logprobs(hidden, output.weight, targets, entropy=entropy, **common)
        return token_loss(hidden, output.weight, targets, **objective._asdict(), **common)


class PackedPolicy(nn.Module):
    """A Hugging Face causal LM that maps a packed batch to the log-probs of its response tokens.

    The model is kept as `self.model`, so its parameters are named "model." + their Hugging Face names. Its attention
    implementation is replaced, in place: from then on the model runs packed rows only, and refuses anything else.

    Args:
        model: the causal LM, on any device, before or after DeepSpeed has partitioned it.
        chunk_size: tokens whose logits exist at the same time; default by device and vocabulary.

    Raises:
        ModelError: an architecture whose attention or logits cannot be reproduced here.
    """

    def __init__(self, model: nn.Module, chunk_size: int | None = None) -> None:
        super().__init__()
        prepare(model)
        self.model = model
        self.head = LogprobHead(model.get_output_embeddings(), chunk_size)

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, entropy: bool = False, objective: Objective | None = None
    ) -> tuple[Tensor, ...]:
        """Log-probs [n] of the response tokens in packed order (`batch.pad` makes [B, T]) and entropies [n] or None;
        with an objective (loss, logprobs, entropies), of which the loss alone carries a gradient.

        A batch without response tokens gives results that are still connected to every parameter.
        """
        hidden = predicting_states(self.model.base_model, batch)
        return self.head(hidden, batch.targets, temperature, entropy, objective)


def predicting_states(trunk: nn.Module, batch: PackedBatch) -> Float[Tensor, "n D"]:
    """The trunk's last hidden state in front of each response token [n, D]: the one that predicts it."""
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

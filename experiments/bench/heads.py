"""The output heads and their common problem: log-probs and entropies of N tokens, and the gradient of Σ c·log p.

The coefficient c of a token is given and is the same for all tokens of a sequence, as in GRPO on fresh rollouts: c =
−Â/N. So a head with its own loss (Liger) solves the same problem. Entropies are metrics without gradient, which some
heads do not compute. Every head leaves its gradients in `hidden.grad` and `weight.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.bench import peers
from upge.logprobs import Coefficients, token_logprobs, token_loss

FLOOR, NAIVE, TWO_PASSES, ONE_PASS = "three matrix products", "full logits", "ours, two passes", "ours, one pass"


class Result(NamedTuple):
    """Log-probs and entropies [N], detached; None if a head does not compute them."""

    logprobs: Tensor | None
    entropies: Tensor | None


@dataclass(frozen=True, eq=False)
class Problem:
    """The input of every head, with B sequences of T tokens, N = B·T.

    Attributes:
        hidden: [N, D] hidden states, a leaf.
        weight: [V, D] output embedding, a leaf.
        targets: [N] token ids.
        advantages: [B] advantages of the sequences.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor

    @staticmethod
    def made(tokens: int, vocabulary: int, width: int, dtype: str, device: str = "cpu") -> Problem:
        """A random problem: hidden states as after a final norm, logits with a standard deviation of 2."""
        sequences = max(n for n in range(1, 9) if tokens % n == 0)
        generator = torch.Generator().manual_seed(0)
        to = {"dtype": getattr(torch, dtype), "device": device}
        hidden = torch.randn(tokens, width, generator=generator).to(**to)
        weight = (torch.randn(vocabulary, width, generator=generator).mul_(2.0 / width**0.5)).to(**to)
        targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        advantages = torch.randn(sequences, generator=generator).to(device)
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), targets, advantages)

    @property
    def coefficients(self) -> Tensor:
        """[N] dL/dlog p of each token."""
        sequences, tokens = len(self.advantages), len(self.targets)
        return (-self.advantages / tokens).repeat_interleave(tokens // sequences)

    def small(self) -> Problem:
        """The same problem with one token per sequence, for warm-up."""
        sequences = len(self.advantages)
        hidden = self.hidden.detach()[:sequences].clone().requires_grad_()
        return replace(self, hidden=hidden, targets=self.targets[:sequences])

    def clear(self) -> None:
        """Remove the gradients."""
        self.hidden.grad = self.weight.grad = None


Head = Callable[[Problem], Result]


def naive(problem: Problem) -> Result:
    """Plain torch with the whole [N, V] matrix of logits."""
    logits = problem.hidden @ problem.weight.t()
    everything = logits.float().log_softmax(dim=-1)
    logprobs = everything.gather(1, problem.targets[:, None])[:, 0]
    with torch.no_grad():
        entropies = -(everything.exp() * everything).sum(dim=-1)
    (logprobs * problem.coefficients).sum().backward()
    return Result(logprobs.detach(), entropies)


def two_passes(problem: Problem) -> Result:
    """Our head for any coefficients, which computes the logits twice."""
    logprobs, entropies = token_logprobs(problem.hidden, problem.weight, problem.targets, entropy=True)
    (logprobs * problem.coefficients).sum().backward()
    return Result(logprobs.detach(), entropies.detach())


def one_pass(problem: Problem) -> Result:
    """Our head for coefficients that depend on a token's own log-prob and entropy, which computes the logits once."""
    given = problem.coefficients

    def coefficients(logprobs: Tensor, entropies: Tensor, chunk: slice) -> Coefficients:
        return Coefficients((given[chunk] * logprobs).sum(), given[chunk], None)

    loss, logprobs, entropies = token_loss(problem.hidden, problem.weight, problem.targets, coefficients)
    loss.backward()
    return Result(logprobs, entropies)


def trl(problem: Problem) -> Result:
    """The head of GRPOTrainer's model with `fused_lm_head=True`, with its chunk size and outputs."""
    utils = peers.load("TRL")
    apply, chunk = utils._ChunkedLogProbFunction.apply, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    wanted = ("log_probs", "entropy")
    outputs = apply(problem.hidden, problem.weight, None, problem.targets, 1.0, chunk, None, 1.0, wanted)
    (outputs[0] * problem.coefficients).sum().backward()
    return Result(outputs[0].detach(), outputs[1].detach())


def verl(problem: Problem) -> Result:
    """verl's FusedLinearForPPO with its own chunk size and torch backend."""
    head = peers.load("verl").FusedLinearForPPO()
    logprobs, entropies = head(problem.hidden, problem.weight, problem.targets)
    (logprobs * problem.coefficients).sum().backward()
    return Result(logprobs.detach(), entropies.detach().float())


def liger(problem: Problem) -> Result:
    """Liger's GRPO loss with all sequences in one chunk; it chunks tokens and vocabulary itself. No entropies."""
    sequences = len(problem.advantages)
    shape = (sequences, len(problem.targets) // sequences)
    loss_of = peers.load("Liger").LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=sequences, loss_type="bnpo"
    )
    mask = torch.ones(shape, device=problem.hidden.device)
    hidden, targets = problem.hidden.view(*shape, -1), problem.targets.view(shape)
    loss, _ = loss_of(hidden, problem.weight, targets, mask, problem.advantages)
    loss.backward()
    return Result(None, None)


def cut_cross_entropy(problem: Problem) -> Result:
    """cut-cross-entropy: on a CPU its compiled torch code with all logits, on CUDA its kernel. No entropies."""
    kind = "cce" if problem.hidden.is_cuda else "torch_compile"
    loss_of = peers.load("cut-cross-entropy").linear_cross_entropy
    losses = loss_of(problem.hidden, problem.weight, problem.targets, impl=kind, reduction="none")
    (-losses * problem.coefficients).sum().backward()
    return Result(-losses.detach(), None)


OURS: dict[str, Head] = {ONE_PASS: one_pass, TWO_PASSES: two_passes}
THEIRS: dict[str, Head] = {"TRL": trl, "Liger": liger, "cut-cross-entropy": cut_cross_entropy, "verl": verl}
HEADS: dict[str, Head] = {NAIVE: naive, **OURS, **THEIRS}


def heads() -> dict[str, Head]:
    """Name → head, for all heads that can be measured here."""
    return {name: head for name, head in HEADS.items() if name not in THEIRS or peers.present(name)}


def floor(problem: Problem) -> Callable[[], None]:
    """The three matrix products that every head needs (logits, dH and dW), into preallocated memory."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=of_hidden)
        torch.mm(logits.t(), hidden, out=of_weight)

    return call


class Reference(NamedTuple):
    """The problem's solution in float64, by the formulas."""

    hidden: Tensor
    weight: Tensor
    logprobs: Tensor
    entropies: Tensor


@torch.no_grad()
def reference(problem: Problem) -> Reference:
    """Solve the problem in float64: with p = softmax(h·Wᵀ) the gradient of the logits is c·(1_y − p)."""
    hidden, weight, targets = problem.hidden.double(), problem.weight.double(), problem.targets[:, None]
    logs = (hidden @ weight.t()).log_softmax(dim=-1)
    logprobs = logs.gather(1, targets)[:, 0]
    probabilities = logs.exp()
    entropies = -logs.mul_(probabilities).sum(dim=-1)
    coefficients = problem.coefficients.double()[:, None]
    gradient = probabilities.mul_(-coefficients).scatter_add_(1, targets, coefficients)
    return Reference(gradient @ weight, gradient.t() @ hidden, logprobs, entropies)

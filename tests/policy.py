"""A tabular policy for the tests: free logits, so gradients can be compared entry by entry in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from upge import Trajectories
from upge.testing import batches
from upge.views import TOKEN_COLUMNS, TRAJECTORY_COLUMNS, Distributions


@dataclass
class Sample:
    """Some trajectories of a tabular policy with `logits` [B, T, V] as the only parameters.

    `rows` gives, for the textbook objectives, one dictionary per trajectory: its own scalars and its own unpadded
    per-token tensors, so that an objective can be written as plain loops over questions, responses and tokens.
    """

    logits: Tensor
    tokens: Tensor
    batch: Trajectories

    def policy(self) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the tokens, each [B, T], as functions of the parameters."""
        return log_softmax(self.logits, self.tokens)

    @property
    def rows(self) -> list[dict]:
        logprobs, entropies = self.policy()
        results = []
        for i in range(len(self.tokens)):
            n = int(self.batch.lengths[i])
            row = {
                "logp": logprobs[i, :n],
                "entropy": entropies[i, :n],
                "reward": float(self.batch.rewards[i]),
                "rewards": {name: float(column[i]) for name, column in self.batch.named_rewards.items()},
                "group": int(self.batch.group[i]),
                "demo": bool(self.batch.is_demonstration[i]),
                "shown": self.batch.is_demonstration_token[i, :n],
                "preference": int(self.batch.preference[i]),
                "replayed": bool(self.batch.is_replayed[i]),
                "finished": bool(self.batch.finished[i]),
                "prompt_value": float(self.batch.prompt_value[i]),
                "index": int(self.batch.index[i]),
            }
            for name in ("behavior", "sampler", "reference"):
                column = getattr(self.batch, f"{name}_logprobs")
                row[name] = (logprobs.detach() if column is None else column)[i, :n]
            row["values"], row["score_norms"] = self.batch.values[i, :n], self.batch.score_norms[i, :n]
            results.append(row | self._distributions(i, n))
        return results

    def _distributions(self, i: int, n: int) -> dict:
        """What a row has of the vocabulary, if the batch has distributions."""
        given = self.batch.distributions
        if given is None:
            return {}
        return {
            "all": self.logits.log_softmax(dim=-1)[i, :n],
            "tokens": self.tokens[i, :n],
            "reference_all": given.reference[i, :n],
            "teacher_all": given.teacher[i, :n],
            "teacher": self.batch.teacher_logprobs[i, :n],
        }

    @property
    def questions(self) -> list[list[dict]]:
        rows = self.rows
        return [[r for r in rows if r["group"] == g] for g in sorted({r["group"] for r in rows})]


class Leaves(Sample):
    """A sample with the log-probs of its tokens as the only parameters, `logits` [B, T]: what the gradient of an
    objective is before it passes through a softmax, so that it can be compared relative to itself, however small."""

    def policy(self) -> tuple[Tensor, Tensor]:
        return self.logits, self.batch.entropies.detach()


def leaves(s: Sample) -> Leaves:
    return Leaves(s.batch.logprobs.detach().clone().requires_grad_(), s.tokens, s.batch)


def log_softmax(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token log-probs and entropies, each [B, T]."""
    full = logits.log_softmax(dim=-1)
    return full.gather(-1, tokens[..., None])[..., 0], -(full.exp() * full).sum(dim=-1)


def score_norms(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, T] ‖∂ log π/∂z‖² of the tokens, as functions of the logits alone."""
    p = logits.detach().softmax(dim=-1)
    return (torch.nn.functional.one_hot(tokens, p.shape[-1]) - p).square().sum(dim=-1)


def sample(
    seed: int = 0,
    groups: int = 5,
    rollouts: int = 4,
    length: int = 6,
    vocabulary: int = 11,
    pairs: bool = False,
    demonstrations: int = 1,
    spread: float = 1.0,
    spike: float = 0.0,
):
    """Groups of different success with a demonstration each, off-policy by a realistic amount; group 0 fails.

    `spread` scales the logits; `spike` is added to one that is not the token's own, at every other position.
    """
    g = torch.Generator().manual_seed(seed)
    size = rollouts + demonstrations
    b = groups * size
    logits = torch.randn(b, length, vocabulary, dtype=torch.float64, generator=g) * spread
    tokens = torch.randint(0, vocabulary, (b, length), generator=g)
    other = torch.nn.functional.one_hot((tokens + 1) % vocabulary, vocabulary)
    logits = (logits + spike * other * (torch.arange(length) % 2 == 0)[:, None]).requires_grad_()
    lengths = torch.randint(1, length + 1, (b,), generator=g)
    logprobs, entropies = log_softmax(logits, tokens)
    noise = lambda scale: torch.randn(b, length, dtype=torch.float64, generator=g) * scale  # noqa: E731
    number = torch.arange(b)
    is_demonstration = number % size >= rollouts
    rewards = torch.randint(0, 2, (b,), generator=g).double()
    rewards[:size], rewards[size : 2 * size] = 0.0, 1.0
    rewards[is_demonstration] = 1.0
    preference = torch.zeros(b, dtype=torch.long)
    if pairs:
        preference[number % size == 0], preference[number % size == 1] = 1, -1
    batch = Trajectories(
        logprobs=logprobs,
        response_mask=torch.arange(length) < lengths[:, None],
        rewards=rewards,
        group=number // size,
        is_demonstration=is_demonstration,
        finished=number % 3 != 2,
        is_replayed=~is_demonstration & (number % size == 1),
        behavior_logprobs=(logprobs.detach() + noise(0.25)).clamp(max=0),
        sampler_logprobs=(logprobs.detach() + noise(0.25)).clamp(max=0),
        reference_logprobs=(logprobs.detach() + noise(0.5)).clamp(max=0),
        values=noise(0.5),
        entropies=entropies,
        score_norms=score_norms(logits, tokens),
        preference=preference,
        step=7,
        **batches.remembered(number // size, 7),
    )
    return Sample(logits, tokens, batch)


def take(s: Sample, rows: Tensor) -> Sample:
    """Some trajectories of a sample, with logits of their own."""
    logits = s.logits.detach()[rows].requires_grad_()
    columns = {f.name: getattr(s.batch, f.name) for f in fields(s.batch)}
    picked = {n: c[rows] for n, c in columns.items() if n in (*TOKEN_COLUMNS, *TRAJECTORY_COLUMNS) and c is not None}
    logprobs, entropies = log_softmax(logits, s.tokens[rows])
    picked |= {"logprobs": logprobs, "entropies": entropies, "row": None}
    return Sample(logits, s.tokens[rows], Trajectories(**{**columns, **picked}))


def changed(s: Sample, **columns: Tensor) -> Sample:
    return Sample(s.logits, s.tokens, replace(s.batch, **columns))


def guided(s: Sample, longest: int = 5) -> Sample:
    """The sample's rollouts, of which two of every four begin with tokens of a demonstration."""
    own = take(s, (~s.batch.is_demonstration).nonzero()[:, 0])
    return Sample(own.logits, own.tokens, batches.guided(own.batch, longest))


def with_named_rewards(s: Sample, seed: int) -> Sample:
    """The sample with two rewards: its own as 'correct', and 'format', which all of every third question have."""
    g = torch.Generator().manual_seed(seed + 60)
    style = torch.randint(0, 3, s.batch.rewards.shape, generator=g).double() / 2
    named = {"correct": s.batch.rewards, "format": torch.where(s.batch.group % 3 == 2, 1.0, style)}
    total = named["correct"] + 0.3 * named["format"]
    return changed(s, rewards=total, named_rewards=named, reward_weights={"correct": 1.0, "format": 0.3})


def with_distributions(s: Sample, seed: int) -> Sample:
    """The sample with the distributions of policy, reference policy and teacher, and columns that agree with them."""
    g = torch.Generator().manual_seed(seed + 70)
    others = []
    for scale in (0.5, 1.0):
        noise = torch.randn(s.logits.shape, dtype=torch.float64, generator=g)
        others.append((s.logits.detach() + scale * noise).log_softmax(dim=-1))
    given = Distributions(s.tokens, s.logits.log_softmax(dim=-1), *others)
    sampled = [one.gather(-1, s.tokens[..., None])[..., 0] for one in others]
    return changed(s, reference_logprobs=sampled[0], teacher_logprobs=sampled[1], distributions=given)


# Batches in which an objective may go wrong. Each is called with a seed and with whether preference pairs are wanted.


def far(seed: int, pairs: bool) -> Sample:
    """Every policy but the current one is far away: ratios far outside any clip range, on both sides."""
    s = sample(seed, pairs=pairs, spread=2.5)
    g = torch.Generator().manual_seed(seed + 50)
    current = s.batch.logprobs.detach()
    away = {
        f"{name}_logprobs": (current + 3 * torch.randn(current.shape, dtype=torch.float64, generator=g)).clamp(max=0)
        for name in ("behavior", "sampler", "reference")
    }
    return changed(s, **away)


def alike(seed: int, pairs: bool) -> Sample:
    """Groups that succeed altogether and groups that fail altogether."""
    s = sample(seed, pairs=pairs)
    return changed(s, rewards=torch.where(s.batch.is_demonstration, 1.0, (s.batch.group % 2).double()).double())


def empty(seed: int, pairs: bool) -> Sample:
    """Responses without a token: a rollout in each of three groups, and two demonstrations."""
    s = sample(seed, pairs=pairs, groups=6)
    mask = s.batch.response_mask.clone()
    mask[[0, 6, 11, 14, 24]] = False
    return changed(s, response_mask=mask)


def without_demonstrations(seed: int, pairs: bool) -> Sample:
    s = sample(seed, pairs=pairs)
    return take(s, (~s.batch.is_demonstration).nonzero()[:, 0])


def some_demonstrations(seed: int, pairs: bool) -> Sample:
    """Two for each question of an even number, none for the others."""
    s = sample(seed, pairs=pairs, demonstrations=2)
    return take(s, (~s.batch.is_demonstration | (s.batch.group % 2 == 0)).nonzero()[:, 0])


def on_policy(seed: int, pairs: bool) -> Sample:
    s = sample(seed, pairs=pairs)
    return changed(s, behavior_logprobs=s.batch.logprobs.detach())


def near(seed: int, pairs: bool) -> Sample:
    """Off-policy by so little that bounds on the ratio of a whole response are met."""
    s = sample(seed, pairs=pairs, groups=12)
    current = s.batch.logprobs.detach()
    noise = torch.randn(current.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 60))
    return changed(s, behavior_logprobs=current + 6e-4 * noise)


CASES: dict[str, Callable[[int, bool], Sample]] = {
    "ragged": lambda seed, pairs: sample(seed, pairs=pairs),
    "far": far,
    "near": near,
    "alike": alike,
    "alone": lambda seed, pairs: sample(seed, pairs=pairs, rollouts=1, groups=7),
    "improbable": lambda seed, pairs: sample(seed, pairs=pairs, spike=40.0),
    "empty": empty,
    "without_demonstrations": without_demonstrations,
    "some_demonstrations": some_demonstrations,
    "on_policy": on_policy,
}

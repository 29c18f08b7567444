"""Which factor of the gradient differs: our factors are swapped one at a time until both gradients are parallel.

The weight of a token is a product (upge/estimator.py),

    w = reduction · mask · Â · f′ · exp(log π_θ - log π_ref),

so every factor is replaced by what frameworks have in its place. The first replacement whose product is parallel to the
gradient of the other side names the factor. If no single one is, all pairs of replacements are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import upge
from experiments.referee.protocol import GROUP, LIMIT, QUESTIONS, Batch, Layout
from upge.algorithm import Algorithm
from upge.components.base import Component
from upge.term import Term

#: Two gradients are parallel if 1 - cosine is below this, and equal if the scale is 1 within it as well.
TOLERANCE = 1e-9
#: Temperatures of the trainer's side that are tried.
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.25, 1.5, 2.0)
MASKS: dict[str, Component] = {
    "no clip": upge.NoMask(),
    "clip 0.2, 0.2": upge.PPOClip(0.2, 0.2),
    "clip 0.2, 0.28": upge.PPOClip(0.2, 0.28),
    "clip 0.2, 0.2, dual 3": upge.PPOClip(0.2, 0.2, dual=3.0),
    "clip 0.2, 0.28, dual 3": upge.PPOClip(0.2, 0.28, dual=3.0),
    "clip 0.2, 0.28, dual 10": upge.PPOClip(0.2, 0.28, dual=10.0),
}
DENOMINATORS: dict[str, Component] = {
    "π_θ (no ratio)": upge.CurrentPolicy(),
    "π_old": upge.BehaviorPolicy(),
    "1": upge.UnitDenominator(),
    "ratio of the response": upge.SequenceBehaviorPolicy(),
    "ratio at most 5": upge.ClippedBehaviorPolicy(high=5.0),
    "ratio at most 1.2": upge.ClippedBehaviorPolicy(high=1.2),
    "ratio at most 1.28": upge.ClippedBehaviorPolicy(high=1.28),
}
ADVANTAGES: dict[str, Component] = {
    "R": upge.ConstantAdvantage(1.0),  # times the reward, in `_advantages`
    "R - mean": upge.GroupRelative(normalize_std=False),
    "(R - mean)/(std + 1e-6)": upge.GroupRelative(),
    "(R - mean)/(std + 1e-4)": upge.GroupRelative(epsilon=1e-4),
    "(R - mean)/(biased std + 1e-6)": upge.GroupRelative(unbiased=False),
    "leave one out": upge.LeaveOneOut(),
}
REDUCTIONS: dict[str, upge.Reduction] = {
    "mean of tokens": upge.TokenMean(),
    "mean of responses": upge.SequenceMean(),
    "mean of responses' sums": upge.SequenceMean(tokens="sum"),
    "mean of prompts": upge.QuestionMean(),
    f"fixed length {LIMIT}": upge.FixedLength(LIMIT),
}


@dataclass(frozen=True)
class Verdict:
    """How the gradient of another side compares with ours.

    Attributes:
        cosine: of the two gradients.
        scale: theirs projected on ours, <theirs, ours>/<ours, ours>.
        factor: what differs: '' = nothing.
        pattern: how the ratio of the tokens' weights varies.
    """

    cosine: float
    scale: float
    factor: str
    pattern: str


def compare(theirs: Tensor, algorithm: Algorithm, batch: Batch, layout: Layout) -> Verdict:
    """Compare the weights [B, T] of another side with those of `algorithm`."""
    if not bool(theirs.isfinite().all()):
        return Verdict(float("nan"), float("nan"), "not finite", f"{int((~theirs.isfinite()).sum())} tokens")
    if not bool(theirs.any()):
        return Verdict(0.0, 0.0, "no gradient", "all are 0")
    ours = algorithm.estimate(batch.trajectories).weights
    cosine, scale = direction(theirs, ours)
    pattern = describe(theirs, ours, batch, layout)
    if cosine > 1 - TOLERANCE:
        same = abs(scale - 1) < 1e-6
        return Verdict(cosine, scale, "" if same else f"scale: {cause(scale, batch, layout)}", pattern)
    return Verdict(cosine, scale, _search(theirs, algorithm, batch, layout), pattern)


def direction(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """(cosine, <theirs, ours>/<ours, ours>); (0, 0) if one of them is 0."""
    product, size, own = (theirs * ours).sum(), theirs.norm(), ours.norm()
    if size == 0 or own == 0:
        return 0.0, 0.0
    return float(product / (size * own)), float(product / own**2)


def describe(theirs: Tensor, ours: Tensor, batch: Batch, layout: Layout) -> str:
    """How the ratio theirs/ours varies over the tokens: what it is constant over, and where one of them alone is 0."""
    mask = batch.trajectories.response_mask
    edge = 1e-12 * float(ours.abs().max())
    notes: list[str] = []
    if bool((theirs.abs() > edge)[~mask].any()):
        notes.append(f"{int((theirs.abs() > edge)[~mask].sum())} tokens of padding have a gradient")
    moved, moves = theirs.abs() > edge, ours.abs() > edge
    for count, text in (((moved & ~moves & mask).sum(), "only theirs"), ((~moved & moves & mask).sum(), "only ours")):
        notes += [f"{int(count)} tokens move in {text}"] if count else []
    both = moved & moves & mask
    ratio = torch.where(both, theirs / torch.where(both, ours, 1), 0)
    rows = torch.arange(len(theirs))
    numbers = {
        "all tokens": torch.zeros_like(rows),
        "each rank": rows // (len(rows) // layout.ranks),
        "each micro-batch": rows // (len(rows) // (layout.ranks * layout.micro_batches)),
        "each prompt": batch.trajectories.group_index,
        "each response": rows,
    }
    over = next((name for name, index in numbers.items() if _constant(ratio, both, index)), "")
    return "; ".join([f"ratio constant over {over}" if over else "ratio differs within responses", *notes])


def _constant(ratio: Tensor, both: Tensor, index: Tensor) -> bool:
    """Whether the ratio is constant within every set of rows with the same number."""
    for number in index.unique():
        values = ratio[index == number][both[index == number]]
        if len(values) and bool((values - values[0]).abs().max() > 1e-5 * values[0].abs()):
            return False
    return True


def cause(scale: float, batch: Batch, layout: Layout) -> str:
    """The number as a product of at most four of the sizes that it can come from, such as '1/micro-batches'."""
    mask = batch.trajectories.response_mask
    known = {
        "micro-batches": layout.micro_batches,
        "ranks": layout.ranks,
        "group size": GROUP,
        "prompts": QUESTIONS,
        "rollouts": len(mask),
        "columns": mask.shape[1],
        "response limit": LIMIT,
        "tokens": int(mask.sum()),
    }
    powers = [(n, float(v) ** p, p) for n, v in known.items() if v > 1 for p in (1, -1)]
    if layout.generation:
        powers.insert(0, ("(micro-batches of an update/of a sampling)", layout.micro_batches / layout.generation, 1))
    sign, size = ("-" if scale < 0 else ""), abs(scale)
    if abs(size - 1) < 1e-6:
        return f"{sign}1"
    for count in (1, 2, 3, 4):
        for chosen in itertools.combinations(powers, count):
            value = 1.0
            for _, factor, _ in chosen:
                value *= factor
            if abs(size / value - 1) < 1e-6:
                above = "·".join(name for name, _, power in chosen if power > 0) or "1"
                below = "/".join(["", *(name for name, _, power in chosen if power < 0)])
                return f"{sign}{above}{below}"
    return f"{scale:.4g}"


@dataclass(frozen=True)
class _Product:
    """The factors of one term on a batch, each [B, T], with the replacements of each."""

    term: Term
    batch: Batch
    counted: Batch
    layout: Layout

    def estimate(self) -> dict[str, dict[str, Tensor]]:
        """Factor → replacement → [B, T]; '' is ours. The mask is evaluated later, because it sees the advantage."""
        data, estimator = self.batch.trajectories, self.term.estimator
        ours = estimator.factors(data)
        return {
            "denominator": {"": self._ratio(ours.log_denominator)}
            | {name: self._ratio(part(part.view(data))) for name, part in self._able(DENOMINATORS).items()}
            | self._inverse(),
            "advantage": {"": ours.advantages} | self._advantages(),
            "likelihood": {"": ours.shape},
            "reduction": {"": self._reduced(self.term.reduction)} | self._reductions(),
        }

    def _able(self, parts: dict[str, Component]) -> dict[str, Component]:
        """The parts whose columns the batch has."""
        has_old = self.batch.trajectories.behavior_logprobs is not None
        return {n: p for n, p in parts.items() if has_old or "behavior_logprobs" not in p.columns}

    def _ratio(self, log_denominator: Tensor) -> Tensor:
        logprobs = self.batch.trajectories.logprobs
        assert logprobs is not None
        return (logprobs.detach() - log_denominator).exp()

    def _inverse(self) -> dict[str, Tensor]:
        data = self.batch.trajectories
        if data.behavior_logprobs is None or data.logprobs is None:
            return {}
        return {"π_θ²/π_old (ratio upside down)": (data.behavior_logprobs - data.logprobs.detach()).exp()}

    def _advantages(self) -> dict[str, Tensor]:
        data = self.batch.trajectories
        if not self.term.source == "rollouts":
            return {}
        values = {name: part(part.view(data)) for name, part in ADVANTAGES.items()}
        rewards = data.rewards[:, None]
        values["R"] = values["R"] * rewards
        values["(R - mean of the batch)/std of the batch"] = ((rewards - rewards.mean()) / rewards.std()).expand_as(
            values["R"]
        )
        return values

    def _reduced(self, reduction: upge.Reduction, parts: int = 1) -> Tensor:
        """[B, T] the reduction's weights; in more than one part, the mean of those of equal parts of the rows."""
        data = self.counted.trajectories
        rows = torch.arange(len(data.rewards)) // (len(data.rewards) // parts)
        active = self.term.active(data)
        weights = sum((reduction(data, active & (rows == part)) for part in range(parts)), torch.zeros(()))
        weights = weights * (self.term.coefficient / parts)
        return weights if self.counted is self.batch else weights.amax(dim=1, keepdim=True).expand_as(weights)

    def _reductions(self) -> dict[str, Tensor]:
        whole = {name: self._reduced(part) for name, part in REDUCTIONS.items()}
        mask = self.batch.trajectories.response_mask
        whole["sum of tokens"] = mask.double()
        whole[f"fixed length {mask.shape[1]} (columns of the batch)"] = self._reduced(upge.FixedLength(mask.shape[1]))
        ranks, steps = self.layout.ranks, self.layout.micro_batches
        sampled = steps // (self.layout.generation or steps)  # samplings in an update
        cuts = (("micro-batches", ranks * steps, steps), ("ranks", ranks, ranks), ("samplings", sampled, sampled))
        for name, parts, number in cuts:
            if number > 1:
                whole[f"mean of the {name}' means of tokens"] = self._reduced(upge.TokenMean(), parts)
        return whole

    def products(self, most: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """(what differs, [B, T] weights), with no replacement first, then with one, up to `most`."""
        factors = self.estimate()
        masks = {"": self.term.estimator.mask} | self._able(MASKS)
        data = self.batch.trajectories

        def product(mask: str, denominator: str, advantage: str, reduction: str) -> Tensor:
            part, values = masks[mask], factors["advantage"][advantage]
            moves = part(part.view(data), *([values] if part.sees_advantages else [])).detach()
            rest = factors["denominator"][denominator] * factors["likelihood"][""] * factors["reduction"][reduction]
            return moves * values * rest

        slots = {"mask": masks, **{s: factors[s] for s in ("denominator", "advantage", "reduction")}}
        for count in range(most + 1):
            for changed in itertools.combinations(slots, count):
                for names in itertools.product(*([n for n in slots[s] if n] for s in changed)):
                    chosen = dict.fromkeys(slots, "") | dict(zip(changed, names, strict=True))
                    yield tuple(f"{s}: {n}" for s, n in zip(changed, names, strict=True)), product(**chosen)


def _search(theirs: Tensor, algorithm: Algorithm, batch: Batch, layout: Layout) -> str:
    """The fewest replacements that give the direction of `theirs`, in words."""
    if len(algorithm.terms) > 1:
        return "not searched: the algorithm has several terms"
    (term,) = algorithm.terms.values()
    best: tuple[float, str] = (0.0, "none")
    for variant in variants(batch):
        product = _Product(term, variant.batch, variant.counted, layout)
        for names, weights in product.products(2 if not variant.name else 1):
            cosine, scale = direction(theirs, weights * variant.jacobian)
            changes = [variant.name, *names] if variant.name else list(names)
            if abs(cosine) > 1 - TOLERANCE:
                rest = "" if abs(scale - 1) < 1e-6 else f"; scale: {cause(scale, batch, layout)}"
                return " + ".join(changes) + rest
            if len(changes) == 1 and abs(cosine) > best[0]:
                best = (abs(cosine), changes[0])
    return f"not among the replacements; nearest {best[1]} (cosine {best[0]:.6f})"


@dataclass(frozen=True)
class Variant:
    """The batch as a loss with a certain fault sees it.

    Attributes:
        name: of the fault; '' = none.
        batch: what the factors are computed on.
        counted: the batch of the reduction; its weight of a response goes to all columns.
        jacobian: [B, T] ∂ (the fault's log-probs)/∂ log π_θ.
    """

    name: str
    batch: Batch
    counted: Batch
    jacobian: Tensor


def variants(batch: Batch) -> Iterator[Variant]:
    """The batch as it is, with padding that is trained on, and at other temperatures on the trainer's side."""
    data, one = batch.trajectories, torch.ones((), dtype=torch.float64)
    yield Variant("", batch, batch, one)

    def changed(logprobs: Tensor, mask: Tensor) -> Batch:
        old = None if data.behavior_logprobs is None else batch.old_logprobs
        own = {"logprobs": logprobs.clone().requires_grad_(), "response_mask": mask, "behavior_logprobs": old}
        own["is_demonstration_token"] = mask & data.is_demonstration[:, None]
        return replace(batch, trajectories=replace(data, **own))

    padded = changed(batch.logprobs, torch.ones_like(data.response_mask))
    yield Variant("mask: padding counts", padded, padded, one)
    yield Variant("mask: padding is summed, but not counted", padded, batch, one)
    for temperature in TEMPERATURES:
        leaf = batch.logprobs.clone().requires_grad_()
        logits = torch.stack([leaf, torch.log1p(-leaf.exp())], dim=-1) / temperature
        heated = logits.log_softmax(-1)[..., 0]
        (jacobian,) = torch.autograd.grad(heated.sum(), leaf)
        own = changed(heated.detach(), data.response_mask)
        yield Variant(f"likelihood: temperature {temperature:g}", own, own, jacobian)

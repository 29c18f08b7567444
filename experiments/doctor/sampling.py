"""Sampler and trainer together: log-probs of both, sleep and refresh, and what sampling and an update cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import algorithms
from experiments.doctor.rows import Context, Row, Verdict, judged, size_of
from experiments.run.workload import pluralize
from upge.models.loading import read_config
from upge.rollout import Rollout, Sampler, Sampling
from upge.train.config import OptimizerConfig
from upge.train.engine import Engine, WeightSync
from upge.train.lr_schedule import LearningRates
from upge.train.sample import Trajectory, indexed
from upge.train.update import Updater

#: (largest, mean) |Δ log p| between sampler and trainer, by type of the model. Rounding in bfloat16 is occasionally
#: large for a single unlikely token.
BOUNDS = {"float32": (0.01, 0.001), "bfloat16": (2.0, 0.05)}
#: Learning rates of the updates that move the policy, until a sampler with the old weights would be noticed.
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
#: The policy has moved enough if its mean |Δ log p| exceeds the bound of the mean by this factor.
_NOTICED = 4.0
#: Part of a GPU's name → its dense bfloat16 peak, FLOP/s. The first that fits counts.
PEAKS = {
    **{"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12},
    **{"B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "A40": 150e12, "A10": 125e12},
}


@dataclass(frozen=True)
class Gap:
    """|Δ log p| between two sets of log-probs of the same tokens, over all ranks."""

    largest: float
    mean: float

    def within(self, dtype: str) -> bool:
        """Whether it is rounding; False for NaN."""
        return self.largest <= BOUNDS[dtype][0] and self.mean <= BOUNDS[dtype][1]

    def __str__(self) -> str:
        return f"max {self.largest:.1e}, mean {self.mean:.1e}"


class Pair:
    """A trainer and a sampler with the same model, and this rank's prompts.

    Args:
        context: of the check-up.
        prompts: token ids; every rank has as many.
    """

    def __init__(self, context: Context, prompts: list[list[int]]) -> None:
        from experiments.run.prepare import load_sampler

        run, config = context.run, context.config
        self.context, self.world, self.prompts = context, context.world, prompts
        settings = OptimizerConfig(lr=_RATES[0], micro_batch_tokens=run.optimizer.micro_batch_tokens)
        self.trainer = Engine(run.model, settings, self.world, run.rollout.temperature)
        length = config.prompt_tokens + context.response_tokens
        engine = load_sampler(run.model, run.rollout, length, run.seed, run.rollout.tensor_parallel)
        self.sampler: Sampler = context.fault.sampler(engine)
        self.sync = WeightSync(self.sampler, self.trainer)
        self.updater = context.fault.updater(Updater(self.trainer, algorithms.load("sft"), settings))
        # Without stop tokens every response has the full length.
        self.sampling = Sampling(run.rollout.temperature, max_tokens=context.response_tokens)

    def sample(self) -> tuple[list[list[Rollout]], float]:
        """Rollouts of this rank's prompts, equal in every call if the weights are, and the slowest rank's seconds."""
        seeds = [self.context.run.seed + self.world.rank * len(self.prompts) + i for i in range(len(self.prompts))]
        self.context.gather(None)
        began = time.perf_counter()
        rollouts = self.sampler.sample(self.prompts, self.context.config.group_size, self.sampling, seeds)
        return rollouts, max(self.context.gather(time.perf_counter() - began))

    @torch.no_grad()
    def gap(self, rollouts: Sequence[Sequence[Rollout]]) -> Gap:
        """The sampler's log-probs of rollouts against those of the trainer's present weights; all ranks call it."""
        differences = []
        for prompt, group in zip(self.prompts, rollouts, strict=True):
            ours = self.trainer.forward([(prompt, one.token_ids) for one in group]).float().cpu()
            differences.append((ours - torch.tensor([one.logprobs for one in group])).abs().flatten())
        of_rank = torch.cat(differences)
        numbers = self.context.gather((float(of_rank.max()), float(of_rank.mean())))
        return Gap(_largest([one for one, _ in numbers]), sum(mean for _, mean in numbers) / self.world.size)

    def refresh(self) -> float:
        """Refresh the sampler; return the slowest rank's seconds."""
        return max(self.context.gather(self.sync.refresh()))

    def update(self, trajectories: list[Trajectory], lr: float) -> float:
        """One update on the trajectories, the same on every rank; returns the slowest rank's seconds."""
        self.context.gather(None)
        began = time.perf_counter()
        report = self.updater.update(trajectories, 0, LearningRates(lr))
        seconds = max(self.context.gather(time.perf_counter() - began))
        if report.skipped:
            raise RuntimeError("the gradient of an update is not finite")
        return seconds

    def trajectories(self, rollouts: Sequence[Sequence[Rollout]]) -> list[Trajectory]:
        """The rollouts of all ranks as demonstrations, which an update makes more likely."""
        pairs = list(zip(self.prompts, rollouts, strict=True))
        of_ranks = [pair for of_rank in self.context.gather(pairs) for pair in of_rank]
        made = [
            Trajectory(group, group, tuple(prompt), one.token_ids, 1.0, True)
            for group, (prompt, members) in enumerate(of_ranks)
            for one in members
        ]
        return indexed(made)


def check(context: Context) -> Iterator[Row]:
    """The rows of sampler and trainer: log-probs, sleep, refresh, speeds."""
    vocabulary = read_config(context.run.model.path, context.run.model.overrides).get_text_config().vocab_size
    g = torch.Generator().manual_seed(context.run.seed + context.world.rank)
    shape = (context.config.prompts, context.config.prompt_tokens)
    pair = Pair(context, torch.randint(0, vocabulary, shape, generator=g).tolist())
    context.at_end.callback(pair.sampler.close)
    yield from _compared(pair)


def _compared(pair: Pair) -> Iterator[Row]:
    dtype = pair.context.run.model.dtype
    pair.refresh()
    first, _ = pair.sample()
    before = pair.gap(first)
    bound = f"at most {BOUNDS[dtype][0]:g} and {BOUNDS[dtype][1]:g}"
    advice = (
        "sampler and trainer do not compute the same model: try rollout.engine=transformers, and report it together "
        "with model and versions; correction=tis or mis corrects small differences in training"
    )
    measured = f"{pair.sampler.name}, sampler against trainer: {before}; {bound}"
    yield judged("log-probs", before.within(dtype), measured, advice, max=before.largest, mean=before.mean)
    yield _slept(pair)
    trajectories = pair.trajectories(first)
    seconds, stale = _moved(pair, trajectories, first)
    yield _update_speed(pair, trajectories, seconds)
    refresh = pair.refresh()
    second, sampling = pair.sample()
    yield _refreshed(pair, refresh, stale, pair.gap(second))
    tokens = pair.world.size * sum(len(one.token_ids) for group in second for one in group)
    rate = tokens / sampling
    measured = f"{pair.sampler.name}: {rate:,.0f} tokens/s on {pluralize(pair.world.size, 'rank')} ({tokens:,} tokens)"
    details = {"engine": pair.sampler.name, "reason": pair.sampler.reason, "tokens": tokens, "tokens_per_second": rate}
    yield Row("sampling", Verdict.OK, measured, details=details)


def _slept(pair: Pair) -> Row:
    """Put the sampler to sleep; on a GPU vLLM must free the memory of its weights and cache."""
    device = pair.world.device
    before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    pair.sync.sleep()
    if device.type != "cuda" or pair.sampler.name != "vllm":
        return Row("sleep", Verdict.NOT_HERE, "only vLLM on a GPU frees memory for the update")
    freed = min(pair.context.gather(torch.cuda.mem_get_info(device)[0] - before))
    weights = pair.context.shape.weights // pair.context.run.rollout.tensor_parallel if pair.context.shape else 0
    advice = "vLLM keeps its memory during updates: check that its sleep mode supports this GPU, or lower "
    advice += "rollout.memory_fraction"
    return judged("sleep", freed >= weights, f"vLLM frees {size_of(freed)}", advice, freed=freed)


def _moved(pair: Pair, trajectories: list[Trajectory], rollouts: list[list[Rollout]]) -> tuple[float, Gap]:
    """Update the policy until a stale sampler would be noticed; return the last update's seconds and the gap then.

    There are at least two updates, because the first one also compiles.
    """
    needed = _NOTICED * BOUNDS[pair.context.run.model.dtype][1]
    seconds, stale = 0.0, Gap(0.0, 0.0)
    for number, lr in enumerate(_RATES):
        seconds = pair.update(trajectories, lr)
        stale = pair.gap(rollouts)
        if number and stale.mean >= needed:
            break
    return seconds, stale


def _refreshed(pair: Pair, seconds: float, stale: Gap, after: Gap) -> Row:
    """Whether the refreshed sampler has the new weights, which must be distinguishable from the old ones."""
    dtype, shape = pair.context.run.model.dtype, pair.context.shape
    moved = stale.mean >= _NOTICED * BOUNDS[dtype][1]
    size = shape.weights if shape else 0
    measured = f"{seconds:.2g} s ({size / seconds / 1e9:.2g} GB/s); |Δ log p| after it: {after}"
    measured += f"; of the old weights: mean {stale.mean:.1e}"
    advice = "the sampler does not get the trainer's weights, so every rollout would be off-policy: try "
    advice += "rollout.engine=transformers, and report it with the versions"
    if not moved:
        advice = "updates do not change the model: the gradient or the optimizer is wrong; see the row gradients"
    details = {"seconds": seconds, "max": after.largest, "mean": after.mean, "mean_of_old_weights": stale.mean}
    return judged("refresh", moved and after.within(dtype), measured, advice, **details)


def _update_speed(pair: Pair, trajectories: list[Trajectory], seconds: float) -> Row:
    """Tokens per second of an update, and the share of the GPUs' peak where that is known."""
    lengths = [len(t.prompt_ids) + len(t.response_ids) for t in trajectories]
    rate = sum(lengths) / seconds
    measured, details = f"{rate:,.0f} tokens/s ({sum(lengths):,} tokens)", {"tokens_per_second": rate}
    shape, device = pair.context.shape, pair.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    if peak and shape and pair.context.run.model.dtype == "bfloat16":
        # The input embedding is not a product. Attention: 2 products, half of whose entries are masked.
        products = shape.parameters - (shape.vocabulary * shape.hidden if shape.output else 0)
        flops = 6 * products * sum(lengths) + 6 * shape.layers * shape.query * sum(n * n for n in lengths)
        details["mfu"] = flops / seconds / (peak * pair.world.size)
        measured += f", MFU {100 * details['mfu']:.0f} %"
    return Row("update", Verdict.OK, measured, details=details)


def _largest(numbers: Sequence[float]) -> float:
    """The largest number; NaN if there is one."""
    return math.nan if any(math.isnan(n) for n in numbers) else max(numbers)

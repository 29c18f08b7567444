"""One update of every algorithm on a fixed batch, under ZeRO-3 on this device, against a plain model on the CPU.

The plain model runs in float32 with full logits and attention over a padded batch. Of the algorithm only its estimate
on the whole batch is used, without a plan, packing, micro-batches or ranks.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import algorithms
from experiments.doctor.models import small
from experiments.doctor.rows import Context, Row, judged
from experiments.run.workload import pluralize
from upge.algorithm import Algorithm
from upge.errors import ConfigError, nearest
from upge.models.loading import read_config
from upge.needs import COMPUTED
from upge.pipeline import Pipeline
from upge.prompt_memory import PromptRecord
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import World
from upge.train.engine import Engine
from upge.train.sample import Trajectory, assemble, indexed
from upge.train.step_batch import StepBatch
from upge.train.update import Update, Updater

#: The largest relative error of a gradient, by type of the model.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.2}
#: Tokens of a micro-batch, so few that every algorithm has several micro-batches, even one that learns from
#: demonstrations alone.
_MICRO_BATCH_TOKENS = 40
#: The step that schedules see.
_STEP = 7
_GROUPS, _GROUP_SIZE = 5, 4
#: Distances of a behavior log-prob from the policy's. They are far from the limits of clips, so that rounding does
#: not decide which tokens a clip masks.
_NEAR, _FAR = 0.05, 0.6


def check(context: Context) -> Iterator[Row]:
    """The row of the gradients."""
    model = small(context)
    with _all_cores(context.world):
        errors = _errors(context, model)
    bound = BOUNDS[model.dtype]
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    wrong = [name for name, error in errors.items() if not error <= bound]
    checked = f"{pluralize(len(errors), 'algorithm')}, {_which(context, model)}"
    measured = f"{checked}: largest relative error {errors[worst]:.1e} ({worst})"
    measured += f", at most {bound:g}" if not wrong else f"; above {bound:g}: {', '.join(wrong)}"
    advice = (
        "an update here is not the gradient of its algorithm; if attention, output head or all-reduce are problems as "
        "well, fix those first; otherwise report it"
    )
    yield judged("gradients", not wrong, measured, advice, errors=errors, bound=bound)


def _errors(context: Context, model: ModelConfig) -> dict[str, float]:
    """Algorithm → error of its gradient, the same on every rank."""
    world = context.world
    plain = PlainModel(model) if world.is_main else None
    filled = context.gather(plain.columns() if plain is not None else {})[0]
    config = OptimizerConfig(lr=0.0, max_grad_norm=0.0, micro_batch_tokens=_MICRO_BATCH_TOKENS)
    engine = Engine(model, config, world)
    errors: dict[str, float] = {}
    for name, algorithm in checked(context.config.algorithms).items():
        batch = completed(algorithm, filled, plain.vocabulary if plain else _vocabulary(model))
        updater = context.fault.updater(Updater(engine, algorithm, config))
        gradients, norm = updated(updater, batch)
        if plain is not None:
            errors[name] = plain.error(algorithm, batch, gradients, norm)
    # DeepSpeed keeps an engine's memory until the process ends, which is why the model is small.
    return context.gather(errors)[0]


def checked(names: Sequence[str] = ()) -> dict[str, Algorithm]:
    """The shipped algorithms, and one with a KL penalty large enough to show next to the other gradient.

    Args:
        names: of those to check; empty = all.

    Raises:
        ConfigError: no algorithm has such a name.
    """
    penalized = algorithms.load("grpo", ["correction.kl_k3.coefficient=1"], corrections=["kl_k3"])
    assert isinstance(penalized, Algorithm)
    known = {**shipped(), "grpo+kl_k3": penalized}
    for name in names:
        if name not in known:
            raise ConfigError(f"no algorithm {name!r} to check; {nearest(str(name), known)}", "algorithms")
    return {name: known[name] for name in names or known}


def shipped() -> dict[str, Algorithm]:
    """Every algorithm of algorithms/ that moves sampled tokens alone; those of several stages as 'NAME: STAGE'.

    The others compare whole distributions, which the plain model would need for every token at once.
    """
    named: dict[str, Algorithm] = {}
    for name in algorithms.names():
        stages = Pipeline.of(algorithms.load(name)).stages
        named |= {name if len(stages) == 1 else f"{name}: {key}": stage.algorithm for key, stage in stages.items()}
    return {name: algorithm for name, algorithm in named.items() if not algorithm.supports}


def trajectories(vocabulary: int, pairs: bool) -> list[Trajectory]:
    """A fixed step: rollouts of five prompts, some of which all fail or all succeed, each with a demonstration.

    With `pairs` a demonstration is the chosen side of a pair, and a rejected one follows it.
    """
    g = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(0, vocabulary, (length,), generator=g).tolist())

    made = []
    for group in range(_GROUPS):
        prompt = tokens(3, 12)
        for member in range(_GROUP_SIZE):
            response = tokens(2, 20)
            reward = float(group == 1 or (group > 1 and member % 2 == group % 2))
            sampled = (-torch.rand(len(response), generator=g) - math.log(vocabulary)).tolist()
            made.append(Trajectory(group, group, prompt, response, reward, False, tuple(sampled), True, "ok"))
        made.append(Trajectory(group, group, prompt, tokens(5, 25), 1.0, True, preference=int(pairs)))
        if pairs:
            made.append(Trajectory(group, group, prompt, tokens(3, 15), 0.0, True, preference=-1))
    return indexed(made)


def completed(algorithm: Algorithm, filled: Mapping[str, Mapping[str, Tensor]], vocabulary: int) -> StepBatch:
    """The fixed batch with the columns that the algorithm reads; it is off-policy.

    Args:
        algorithm: says what it reads.
        filled: 'pairs' and 'plain' → column → values [B, T].
        vocabulary: of the model.
    """
    pairs = algorithm.needs.preference_pairs
    members, columns = trajectories(vocabulary, pairs), filled["pairs" if pairs else "plain"]
    if algorithm.memory is not None:
        new = algorithm.memory.remembered(PromptRecord(), _STEP)
        members = [dataclasses.replace(one, remembered=new) for one in members]
    wanted = {"behavior_logprobs"} | algorithm.needs.columns & COMPUTED
    wanted |= algorithm.needs.precomputed
    state = algorithm.initial_state()
    batch = dataclasses.replace(assemble(members, _STEP), state=state, **{name: columns[name] for name in wanted})
    named = dict.fromkeys(algorithm.needs.rewards, batch.rewards)
    batch = dataclasses.replace(batch, named_rewards=named)
    return StepBatch(batch, members)


def updated(updater: Updater, batch: StepBatch) -> tuple[dict[str, Tensor], float]:
    """The gradient by parameter, on rank 0, and the norm that an update at a learning rate of 0 reports.

    All ranks call it; the model is unchanged afterwards.
    """
    from deepspeed.utils import safe_get_full_grad

    plan, rows = updater.algorithm.plan(batch.columns), torch.arange(len(batch.trajectories))
    updater.run_micro_batches(Update(batch, plan, rows))
    gradients, engine = {}, updater.engine
    for name, parameter in engine.network.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if engine.world.is_main:
            gradients[name] = gradient.float().cpu().clone()
    return gradients, engine.step(lr=0.0).norm


class PlainModel:
    """The model on the CPU in float32, and its log-probs and entropies on the fixed batches."""

    def __init__(self, model: ModelConfig) -> None:
        from transformers import AutoModelForCausalLM

        config = read_config(model.path, model.overrides)
        # The weights are rounded as those of the device are.
        dtype = getattr(torch, model.dtype)
        loaded = AutoModelForCausalLM.from_pretrained(model.path, config=config, dtype=dtype, trust_remote_code=False)
        self.network: nn.Module = loaded.float()
        self.vocabulary = config.get_text_config().vocab_size
        self.live = {kind: self._live(trajectories(self.vocabulary, kind == "pairs")) for kind in ("plain", "pairs")}

    def columns(self) -> dict[str, dict[str, Tensor]]:
        """What a behavior and a reference policy and a critic might give for the fixed batches, [B, T]."""
        return {kind: _made_up(logprobs.detach()) for kind, (logprobs, _) in self.live.items()}

    def error(self, algorithm: Algorithm, batch: StepBatch, gradients: Mapping[str, Tensor], norm: float) -> float:
        """The error of a gradient or of its norm, whichever is larger, relative to the norm of the right gradient."""
        logprobs, entropies = self.live["pairs" if algorithm.needs.preference_pairs else "plain"]
        leaves = [logprobs.detach().requires_grad_(), entropies.detach().requires_grad_()]
        whole = dataclasses.replace(batch.columns, logprobs=leaves[0], entropies=leaves[1])
        factors = torch.autograd.grad(algorithm.estimate(whole).loss, leaves, allow_unused=True)
        pairs = [(live, f) for live, f in zip((logprobs, entropies), factors, strict=True) if f is not None]
        named = dict(self.network.named_parameters())
        right = torch.autograd.grad(
            [live for live, _ in pairs], list(named.values()), [f for _, f in pairs], retain_graph=True
        )
        if set(named) != set(gradients):
            raise RuntimeError(f"parameters of only one model: {sorted(set(named) ^ set(gradients))[:3]}")
        size = math.sqrt(sum(float(g.double().square().sum()) for g in right))
        off = sum(float((gradients[n] - g).double().square().sum()) for n, g in zip(named, right, strict=True))
        return max(math.sqrt(off), abs(norm - size), key=lambda e: math.inf if math.isnan(e) else e) / size

    def _live(self, members: list[Trajectory]) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, T] of the responses. Padding is on the right, where nothing attends to it."""
        ids = [torch.tensor([*t.prompt_ids, *t.response_ids]) for t in members]
        logits = self.network(input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True), use_cache=False).logits
        width, rows = max(len(t.response_ids) for t in members), []
        for row, t in enumerate(members):
            first, count = len(t.prompt_ids) - 1, len(t.response_ids)
            full = logits[row, first : first + count].log_softmax(-1)
            chosen = full.gather(-1, torch.tensor(t.response_ids)[:, None])[:, 0]
            both = torch.stack([chosen, -(full.exp() * full).sum(-1)])
            rows.append(nn.functional.pad(both, (0, width - count)))
        logprobs, entropies = torch.stack(rows).unbind(1)
        return logprobs, entropies


def _made_up(logprobs: Tensor) -> dict[str, Tensor]:
    """Columns near the log-probs [B, T]. All tokens of a response deviate in the same direction."""
    g = torch.Generator().manual_seed(1)
    below = torch.rand(len(logprobs), 1, generator=g) < 0.5
    far = torch.rand(logprobs.shape, generator=g) < 0.5
    distance = torch.where(far, _FAR, _NEAR) * torch.where(below, -1.0, 1.0)
    noise = torch.randn(3, *logprobs.shape, generator=g)
    return {
        "behavior_logprobs": (logprobs + distance).clamp(max=0.0),
        "reference_logprobs": (logprobs + 0.3 * noise[0]).clamp(max=0.0),
        "values": 0.5 * noise[1],
        "teacher_logprobs": (logprobs + 0.5 * noise[2]).clamp(max=0.0),
        "score_norms": (1 - logprobs.exp()).square(),
    }


def _vocabulary(model: ModelConfig) -> int:
    return read_config(model.path, model.overrides).get_text_config().vocab_size


def _which(context: Context, model: ModelConfig) -> str:
    """Which model was compared."""
    return "this model" if model.path == context.run.model.path else "a random model with 2 such layers"


@contextmanager
def _all_cores(world: World) -> Iterator[None]:
    """Let the plain model use all cores while the ranks' own models use GPUs; torchrun sets one thread."""
    before = torch.get_num_threads()
    if world.is_main and world.device.type == "cuda":
        torch.set_num_threads(max(before, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)

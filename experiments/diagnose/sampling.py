"""The policies of a diagnosis, and the pool that each one samples: problems, rollouts, demonstrations and pairs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

from experiments.config import compose, presets
from experiments.diagnose.settings import Chosen
from experiments.run.prepare import check_length, load_prompting, load_sampler, verifier_pool
from experiments.run.problems import check_answers, load_problems
from upge import data, rollout
from upge.data import Example, Prompting
from upge.errors import ConfigError, DataError, ModelError
from upge.measure.contributions import pass_rate
from upge.measure.pool import Group, Pool, deal
from upge.models import local_path
from upge.models.loading import check_loaded, has_cuda, read_config
from upge.rollout import Sampler, Sampling
from upge.rollout.verified_sampling import FirstError, VerifiedSampler
from upge.train.adapter import Adapter
from upge.train.config import ModelConfig, RunConfig
from upge.train.faults import NONE, Fault
from upge.train.folder import RunFolder
from upge.train.prompt_order import prompt_indices, stream_seed
from upge.train.resharding import whole_weights
from upge.train.sample import Trajectory, has_pair
from upge.train.verdicts import FAILED
from upge.verify import Reward, Verdict, VerifierPool


@dataclass(frozen=True)
class Policy:
    """A model to measure.

    Attributes:
        model: its settings, with a folder as path.
        step: its training step if it comes from a run, else None.
    """

    label: str
    model: ModelConfig
    step: int | None = None


@contextlib.contextmanager
def policies(chosen: Chosen) -> Iterator[list[Policy]]:
    """A context manager with the policies of a command line; their unpacked files exist within it.

    Raises:
        ConfigError: two policies have the same name.
        ModelError: a policy cannot be read.
    """
    with TemporaryDirectory(prefix="diagnose") as folder:
        made = list(_policies(chosen, Path(folder)))
        # Compare the names of their folders, which must differ.
        names = [folder_name(one.label).lower() for one in made]
        twice = next((one.label for one, name in zip(made, names, strict=True) if names.count(name) > 1), None)
        if twice is not None:
            fix = "name them, as in policies=[LABEL:PATH,...]"
            raise ConfigError(f"policies: several would be called '{twice}'; {fix}")
        yield made


def folder_name(label: str) -> str:
    """The name of a policy's folder within a diagnosis."""
    return re.sub(r"[^\w.-]+", "_", label)


def model_of(name: str, base: ModelConfig) -> ModelConfig:
    """The settings of a model given as a preset, a folder or a file, with the prompt settings of `base`."""
    path = name
    if name in presets("model"):
        path = compose([f"model={name}"]).config.model.path
    elif not Path(name).expanduser().exists() and name.count("/") != 1:
        raise ConfigError(f"'{name}' is neither a model's folder nor one of {', '.join(presets('model'))}; give one")
    return replace(base, path=local_path(str(Path(path).expanduser()) if Path(path).expanduser().exists() else path))


def load_model(model: ModelConfig) -> torch.nn.Module:
    """Load the causal LM in its dtype, on a GPU if there is one.

    Raises:
        ModelError: it cannot be loaded or is incomplete.
    """
    from transformers import AutoModelForCausalLM

    try:
        config, dtype = read_config(model.path, model.overrides), getattr(torch, model.dtype)
        loaded = AutoModelForCausalLM.from_pretrained(
            model.path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.path: '{model.path}' cannot be loaded: {str(error).splitlines()[0]}") from error
    network, loading_info = loaded
    check_loaded(model.path, loading_info)
    return network.to("cuda" if has_cuda() else "cpu")


def _policies(chosen: Chosen, scratch: Path) -> Iterator[Policy]:
    base = replace(chosen.run.model, path=local_path(chosen.run.model.path))
    if chosen.config.policies:
        for entry in chosen.config.policies:
            label, colon, name = entry.rpartition(":")
            # A GGUF file of a package has a colon of its own.
            if not colon or name.lower().endswith(".gguf"):
                label, name = Path(entry).name, entry
            yield Policy(label, model_of(name, base))
    elif chosen.config.run:
        yield from _of_run(RunFolder(Path(chosen.config.run).expanduser()), base, scratch)
    else:
        yield Policy(chosen.names["model"], base)


def _of_run(folder: RunFolder, base: ModelConfig, scratch: Path) -> Iterator[Policy]:
    """The run's initial model, each kept checkpoint, and the final model unless a checkpoint has its step."""
    yield Policy("0", base, 0)
    steps = folder.checkpoint_steps()
    for step in steps:
        path = scratch / folder.tag(step)
        unpack(folder.checkpoints, folder.tag(step), base, path)
        Fault(str(folder.metadata.get("fault", NONE))).mark(path)
        yield Policy(str(step), replace(base, path=str(path), overrides={}), step)
    last = folder.metadata.get("finished_step")
    if last is not None and last not in steps:
        yield Policy(str(last), replace(base, path=str(folder.final), overrides={}), int(last))
    best = folder.best_metadata
    if best and best["step"] not in {0, last, *steps}:
        yield Policy(str(best["step"]), replace(base, path=str(folder.best), overrides={}), int(best["step"]))


def unpack(checkpoints: Path, tag: str, model: ModelConfig, folder: Path) -> None:
    """Write the weights of a checkpoint of a run that started from `model`, in Hugging Face format.

    A run with LoRA saved its adapters only; they are added to `model`.

    Raises:
        ModelError: the checkpoint cannot be read, or belongs to another model.
    """
    network = load_model(model).cpu()
    adapter = Adapter(network, model.lora) if model.lora.rank else None
    try:
        state = whole_weights(checkpoints / tag)
        # In training the model is the part `model` of a policy.
        weights = {name.removeprefix("model."): values for name, values in state.items()}
        missing, unexpected = network.load_state_dict(weights, strict=adapter is None)
        if adapter is not None and (unexpected or {name for name, _ in adapter.parameters()} & set(missing)):
            raise KeyError(f"its adapters are not those of model.lora: {[*unexpected, *missing][0]}")
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{checkpoints / tag}: the checkpoint cannot be read: {reason[0]}") from error
    merged = {weight.name: weight.merged() for weight in adapter.weights()} if adapter else None
    network.save_pretrained(folder, state_dict=merged)


def ordered(given: Sequence[Policy]) -> list[Policy]:
    """The policies by step if all have one, else in the given order."""
    return sorted(given, key=lambda one: one.step) if all(one.step is not None for one in given) else list(given)


#: The most independent parts of the reference rollouts.
PARTS = 8


@dataclass(frozen=True)
class Problems:
    """The prompts of a diagnosis; `notes` are sentences for the user."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prompting: Prompting
    verifiers: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_pairs(self) -> bool:
        """Whether some example has a preference pair."""
        return any(map(has_pair, self.examples))


@dataclass(frozen=True)
class Sampled:
    """The pool, and the reference rollouts of held-out prompts: [prompts][parts]."""

    pool: Pool
    held_out: list[list[list[Trajectory]]]


def problems(chosen: Chosen, model: ModelConfig) -> Problems:
    """The prompts of a diagnosis: `prompts` of the training side, in the order of training.

    If an algorithm needs demonstrations, prompts without one are skipped, and likewise for preference pairs, so that
    every algorithm is measured on the same prompts.

    Raises:
        UserError: data, model or limits are wrong, as before a run.
    """
    config, run = chosen.config, chosen.run
    limits = {name: getattr(run.rollout, name) for name in ("max_prompt_tokens", "max_response_tokens")}
    check_length(model, *limits.values())
    splits, notes = load_problems(chosen.tree["data"], run)
    prompting = load_prompting(model)
    needs = [algorithm.needs for algorithm in chosen.algorithms.values()]
    policy = run.data_policy
    encoded = data.encode(
        splits.train, prompting, **limits, overlong_prompts=policy.overlong_prompts,
        overlong_demonstrations=policy.overlong_demonstrations,
    ).examples  # fmt: skip
    given, paired = any(n.demonstrations for n in needs), any(n.preference_pairs for n in needs)
    paired = paired and any(map(has_pair, encoded))
    wanted = [e for e in encoded if (e.demonstrations or not given) and (has_pair(e) or not paired)]
    if len(wanted) < len(encoded):
        notes.append(f"{len(encoded) - len(wanted)} of {len(encoded)} prompts lack a demonstration or pair that an "
                     "algorithm needs, and are left out for all algorithms")  # fmt: skip
    if len(wanted) < config.prompts:
        raise ConfigError(f"prompts: {config.prompts}, but the data set has {len(wanted)} usable ones; give fewer")
    chosen_ones = tuple(wanted[i] for i in prompt_indices(0, config.prompts, len(wanted), run.seed))
    held_out: tuple[Example, ...] = ()
    if config.held_out:
        if len(splits.evaluation) < config.held_out:
            raise DataError(f"held_out: {config.held_out}, but there are {len(splits.evaluation)} evaluation problems")
        encoded_evaluation = data.encode(splits.evaluation, prompting, **limits, overlong_prompts="drop").examples
        held_out = encoded_evaluation[: config.held_out]
        if len(held_out) < config.held_out:
            raise DataError(
                f"held_out: {config.held_out}, but the prompts of only {len(held_out)} evaluation problems are within "
                "rollout.max_prompt_tokens; give fewer, or raise the limit"
            )
    needed_problems = [example.problem for example in (*chosen_ones, *held_out)]
    return Problems(chosen_ones, held_out, prompting, check_answers(needed_problems, run.verify.verifier), tuple(notes))


@dataclass(frozen=True)
class Draws:
    """Samples and verifies rollouts of examples; the seeds follow from the run's seed, the purpose and the example.

    Attributes:
        run: settings of sampling and verification.
        say: prints a line of progress.
    """

    run: RunConfig
    prompting: Prompting
    pool: VerifierPool
    say: Callable[[str], None]
    first_error: FirstError = field(default_factory=FirstError)

    def __call__(self, sampler: Sampler, purpose: str, examples: Sequence[Example], n: int) -> list[list[Trajectory]]:
        """n rollouts of each example, whose number is their `group`."""
        limit, temperature = self.run.rollout.max_response_tokens, self.run.rollout.temperature
        sampling = Sampling(temperature, 1.0, limit, self.prompting.stop_token_ids)
        seeds = [stream_seed(self.run.seed, "diagnose", purpose, q) for q in range(len(examples))]
        sampled = VerifiedSampler(sampler, self.pool, self.prompting).sample(examples, n, sampling, seeds)
        self.first_error(sampled.first_error)
        failed = sum(verdict.status in FAILED for group in sampled.groups for _, verdict in group)
        without = f", {failed} of them without a verdict, which count as wrong" if failed else ""
        self.say(f"{purpose}: {n} rollouts of {len(examples)} prompts{without}")
        each = enumerate(zip(examples, sampled.groups, strict=True))
        return [
            [_rollout(q, example, self.run, self.pool.rewards, *pair) for pair in group] for q, (example, group) in each
        ]


def sample(
    chosen: Chosen, prompts: Problems, model: ModelConfig, behavior: ModelConfig | None, say: Callable[[str], None]
) -> Sampled:
    """Sample and verify all rollouts of a pool: those of the batches from `behavior`, the others from `model`."""
    config, run = chosen.config, chosen.run
    length = run.rollout.max_prompt_tokens + run.rollout.max_response_tokens
    size, parted = _parted(config.reference)
    with verifier_pool(prompts.verifiers, run.verify) as pool:
        drawn = Draws(run, prompts.prompting, pool, say)
        sampler = load_sampler(model, run.rollout, length, run.seed)
        say(f"rollouts: {sampler.reason}")
        passed = drawn(sampler, "pass rates", prompts.examples, config.pass_samples)
        reference = drawn(sampler, "reference", prompts.examples, parted)
        others = drawn(sampler, "held out", prompts.held_out, parted) if prompts.held_out else []
        if behavior is not None:
            sampler.close()
            sampler = load_sampler(behavior, run.rollout, length, run.seed)
        own = drawn(sampler, "batches", prompts.examples, config.rounds * config.group_size)
        sampler.close()
        rewards = pool.rewards
    groups = []
    for q, (example, rounds) in enumerate(zip(prompts.examples, _parts(own, config.group_size), strict=True)):
        groups.append([Group(tuple(one), *given(q, example, r, run, rewards)) for r, one in enumerate(rounds)])
    dealt = deal(config.prompts, config.prompts_per_step, config.rounds, run.seed)
    rates = torch.tensor([pass_rate(rollouts) for rollouts in passed], dtype=torch.float64)
    return Sampled(Pool(groups, dealt, _parts(reference, size), rates), _parts(others, size))


def _parted(rollouts: int) -> tuple[int, int]:
    """(rollouts in each part of the reference: at least two, for a baseline; their number in all equal parts)."""
    size = max(2, math.ceil(rollouts / PARTS))
    return size, math.ceil(rollouts / size) * size


def _parts(groups: list[list[Trajectory]], size: int) -> list[list[list[Trajectory]]]:
    """[prompts][parts] of [prompts] rollouts."""
    return [[own[i : i + size] for i in range(0, len(own), size)] for own in groups]


def _rollout(
    q: int, example: Example, run, rewards: Mapping[str, Reward], response: rollout.Rollout, verdict: Verdict
) -> Trajectory:
    reward = rewards[example.problem.verifier or run.verify.verifier]
    return Trajectory(
        q, q, tuple(example.prompt_ids), response.token_ids, verdict.reward, False, response.logprobs,
        response.finished, verdict.status, pass_threshold=run.verify.pass_threshold,
        success=run.verify.success, rewards=reward.named(verdict),
    )  # fmt: skip


def given(
    q: int, example: Example, number: int, run, rewards: Mapping[str, Reward]
) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    """Random demonstrations of a prompt for a round, and its preference pair.

    A run goes through them in order, but then rounds would not be independent of each other.
    """
    count, wanted = len(example.demonstrations), run.data_policy.demonstrations
    chosen = list(range(count))
    if count and 0 < wanted < count:
        first = stream_seed(run.seed, "diagnose", "demonstration", q, number) % count
        chosen = [(first + i) % count for i in range(wanted)]
    reward = rewards[example.problem.verifier or run.verify.verifier]
    best, worst = reward.best(), reward.worst()
    passing = {"pass_threshold": run.verify.pass_threshold, "success": run.verify.success}
    named = {"rewards": reward.named(best), **passing}
    given = Trajectory(q, q, tuple(example.prompt_ids), (), best.reward, True, **named)
    every = [replace(given, response_ids=tuple(ids)) for ids in example.demonstrations]
    shown = tuple(every[i] for i in chosen)
    if not has_pair(example):
        return shown, ()
    better = replace(every[0], preference=1)
    lost = {"reward": worst.reward, "rewards": reward.named(worst), "preference": -1}
    return shown, (better, replace(better, response_ids=tuple(example.rejected_ids), **lost))

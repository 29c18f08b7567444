"""Sampled tokens per second: vLLM with the prompt shared in a group, in blocks of 32 and 128 tokens, vLLM without
sharing, and transformers' `generate`; prompts and seeds are the same for all and change every round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.bench.measure import Ending, Timing, interleaved
from experiments.grid import markdown_table
from upge import config
from upge.errors import ConfigError
from upge.rollout import Rollout, Sampler, Sampling

SUMMARY = "sampled tokens per second: sharing a group's prompt, and vLLM against transformers"
OURS, THEIRS, NOTHING, OTHER = "vLLM, blocks of 32", "vLLM, blocks of 128", "vLLM, nothing shared", "transformers"
OPTIONS = {OURS: {}, THEIRS: {"block_size": 128}, NOTHING: {"enable_prefix_caching": False}}


@dataclass(frozen=True)
class Settings(config.Settings):
    """Keys of this bench."""

    folder: str = config.key(
        "", "the folder of GSM8K, to measure SmolLM2-135M on it; empty = the tiny model on arithmetic"
    )
    prompts: int = config.key(32, "prompts of a round", minimum=1, limit=10**5)
    group_size: int = config.key(8, "responses to each prompt", minimum=1, limit=4096)
    tokens: int = config.key(64, "maximum tokens of a response", minimum=1, limit=10**6)
    rounds: int = config.key(5, "number of rounds, at least five", minimum=0, limit=1000)
    transformers: bool = config.key(True, "also measure transformers, which takes much longer if the model is not tiny")


def run(settings: Settings) -> str:
    """A Markdown table. All vLLM engines are in one process, each with a cache large enough for a round.

    Raises:
        ConfigError: vLLM is not installed.
    """
    path, prompts, stops = _model(settings)
    longest = max(map(len, prompts)) + settings.tokens
    samplers = _samplers(path, longest, settings)
    sampling = Sampling(max_tokens=settings.tokens, stop_token_ids=stops)

    def sample(sampler: Sampler) -> Callable[[int], list[list[Rollout]]]:
        def of_round(number: int) -> list[list[Rollout]]:
            chosen = prompts[number * settings.prompts : (number + 1) * settings.prompts]
            return sampler.sample(chosen, settings.group_size, sampling, range(number, number + len(chosen)))

        return of_round

    things = {name: sample(sampler) for name, sampler in samplers.items()}
    for sampler in samplers.values():  # warm up
        sampler.sample(prompts[:1], 2, Sampling(max_tokens=2), [0])
    timing = interleaved(things, settings.rounds)
    for sampler in reversed(samplers.values()):
        sampler.close()
    return Ending(timing.signal).finished(table(timing, sum(map(len, prompts)) / len(prompts), settings))


def table(timing: Timing, length: float, settings: Settings) -> str:
    """Tokens per second, ratios to vLLM's default, and how many of vLLM's responses do not depend on sharing."""
    rows = []
    for name, seconds in timing.seconds.items():
        # Rounds differ in length, so the rate is over all rounds and only the ratios have a range.
        rate = sum(map(tokens, timing.results[name])) / sum(seconds)
        ratios = [_range(kind[name], kind[THEIRS]) for kind in (timing.seconds, timing.cpu)]
        rows.append([name, f"{rate:.0f}", *(["1", "1"] if name == THEIRS else ratios)])
    same, of = agreement(timing.results[OURS], timing.results[NOTHING])
    model = "SmolLM2-135M on GSM8K" if settings.folder else "The tiny model on arithmetic"
    about = (
        f"{model}: {settings.prompts} prompts of {length:.0f} tokens, {settings.group_size} responses of at most "
        f"{settings.tokens} to each; {settings.rounds} rounds, ratios in the round, median and range. {same} of {of} "
        "responses have the same tokens with blocks of 32 and with nothing shared."
    )
    header = ["with", "tokens per second", "times blocks of 128", "the same in CPU seconds"]
    return f"{markdown_table(header, rows)}\n\n{about}"


def tokens(groups: Sequence[Sequence[Rollout]]) -> int:
    """The number of sampled tokens."""
    return sum(len(rollout.token_ids) for group in groups for rollout in group)


def agreement(some: Sequence[Any], others: Sequence[Any]) -> tuple[int, int]:
    """(number of responses with the same tokens, number of all responses)."""
    first, second = ([r.token_ids for groups in rounds for g in groups for r in g] for rounds in (some, others))
    return sum(a == b for a, b in zip(first, second, strict=True)), len(first)


def _range(fast: Sequence[float], slow: Sequence[float]) -> str:
    ratios = sorted(b / a for a, b in zip(fast, slow, strict=True))
    return f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _model(settings: Settings) -> tuple[str, list[tuple[int, ...]], tuple[int, ...]]:
    """The model's folder, prompts for all rounds, and the tokens that end a response."""
    from experiments.config import compose
    from experiments.run.prepare import load_prompting, with_local_models
    from experiments.run.problems import load_splits

    data = ["model=tiny", "data=arithmetic"]
    if settings.folder:
        data = ["model=smollm2-135m", "data=gsm8k", f"data.path={Path(settings.folder).expanduser().absolute()}"]
    composed = with_local_models(compose(data))
    prompting = load_prompting(composed.config.model)
    problems = load_splits(composed.tree["data"]).train
    if len(problems) < settings.rounds * settings.prompts:
        raise ConfigError(f"prompts: {settings.prompts} in each of {settings.rounds} rounds are more than there are")
    prompt_ids = prompting.prompt_ids(problems[: settings.rounds * settings.prompts])
    return composed.config.model.path, prompt_ids, prompting.stop_token_ids


def _samplers(path: str, longest: int, settings: Settings) -> dict[str, Sampler]:
    from upge.rollout.transformers_engine import TransformersSampler
    from upge.rollout.vllm_engine import VLLMSampler, cache_bytes_per_token
    from upge.rollout.vllm_process import cache_bytes, why_not_vllm

    obstacle = why_not_vllm("cpu")
    if obstacle:
        raise ConfigError(f"this bench needs vLLM on a CPU: {obstacle}")

    class Changed(VLLMSampler):
        """A VLLMSampler with changed options."""

        changes: dict[str, Any] = {}  # noqa: RUF012

        def _options(self, config: Any, memory_fraction: float, max_sequences: int) -> dict[str, Any]:
            sequences = settings.prompts * settings.group_size
            memory = cache_bytes(sequences, longest, cache_bytes_per_token(config, self._dtype), memory_fraction, 128)
            return (
                super()._options(config, memory_fraction, max_sequences)
                | {"kv_cache_memory_bytes": memory}
                | self.changes
            )

    samplers: dict[str, Sampler] = {}
    for name, changes in OPTIONS.items():
        kind = type("Changed", (Changed,), {"changes": changes})
        samplers[name] = kind(path, dtype="float32", max_length=longest, memory_fraction=0.1)
    if settings.transformers:
        samplers[OTHER] = TransformersSampler(path, dtype="float32", max_length=longest)
    return samplers

"""What the tests of the samplers look at, gathered in processes of their own because vLLM may abort one at its exit.

python -m tests.rollout_ranks observe ENGINE FOLDER OUTPUT     one process, both models, and TINY with OVERRIDES
python -m tests.rollout_ranks repeat ENGINE FOLDER OUTPUT      the same first call in a fresh process
python -m tests.rollout_ranks greedy ENGINE MODEL PROMPTS OUTPUT   16 greedy tokens after each of some prompts
torchrun -m tests.rollout_ranks ranks FOLDER K OUTPUT          vLLM on several ranks, K per engine

FOLDER holds models `tied`, `untied` and, with other weights, `tied_new`, `untied_new`. OUTPUT is JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
import torch._dynamo

from upge.errors import ModelError
from upge.rollout import Rollout, Sampler, Sampling, load

KINDS = ("tied", "untied")
VOCABULARY = 64
PROMPTS = ((5, 6, 7), (9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4), (20, 30, 40, 50, 60))
SEEDS = (0, 1, 2)
STOP = (1, 2, 3, 4)
SAMPLINGS = {
    "plain": Sampling(temperature=1.0, max_tokens=24, stop_token_ids=STOP),
    "cool": Sampling(temperature=0.7, max_tokens=24, stop_token_ids=STOP),
    "nucleus": Sampling(temperature=1.3, top_p=0.8, max_tokens=24, stop_token_ids=STOP),
    "greedy": Sampling(temperature=0.0, max_tokens=24, stop_token_ids=STOP),
    "endless": Sampling(temperature=1.0, max_tokens=24),
}
COPIES = 4
# Responses that continue tokens. Among these is one that would end a response. One response has a single token left.
PREFIXES = {(0, 1): (11, 12, 13), (1, 0): (30, STOP[0], 31), (1, 3): (*range(20, 43),), (2, 2): (25,)}
# 64 prompts with neighbouring seeds, 32 responses to each: responses must be as good as independent.
CROWD = (64, 32, Sampling(max_tokens=8))
# Room enough for one response to end long before another.
LONG = Sampling(max_tokens=200, stop_token_ids=STOP)
# Together more tokens than vLLM prefills at once on a CPU, so that some prompt would have to be split.
LONG_PROMPTS = tuple(tuple(5 + (i + j) % 50 for j in range(230)) for i in range(24))
TINY = Path(__file__).parents[1] / "experiments" / "models" / "tiny"
# More positions than TINY's 2,048 are asked for as well, so that an engine that ignored the overrides would not start.
OVERRIDES = {"rope_theta": 40.0, "max_position_embeddings": 4096}
OVERRIDDEN_LENGTH = 2100
RANK_PROMPTS = (((), PROMPTS), (PROMPTS[:1], PROMPTS[1:]), (PROMPTS, ()))


def make_model(path: Path, tied: bool, seed: int) -> None:
    """A random Qwen2 with two heads of size 32, and generation defaults that no sampler may take over."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
                eos_token_id=1,
                initializer_range=0.15,
            )
        )
    network.generation_config = GenerationConfig(
        do_sample=True, top_k=3, temperature=0.3, repetition_penalty=2.0, eos_token_id=9, max_new_tokens=2
    )
    network.save_pretrained(path)


def plain(groups: list[list[Rollout]]) -> list:
    """Rollouts as JSON holds them: [token_ids, logprobs, finished]."""
    return [[[list(r.token_ids), list(r.logprobs), r.finished] for r in group] for group in groups]


def weights(folder: Path, with_head: bool) -> list[tuple[str, torch.Tensor]]:
    """The weights of a saved model by name; a tied head is listed under its own name only if `with_head`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [(n, p.detach()) for n, p in model.named_parameters(remove_duplicate=not with_head)]


def one_by_one(pairs: list[tuple[str, torch.Tensor]]):
    """Pass weights on in one buffer each, destroyed as soon as the next is asked for, as a gathering trainer may."""
    for name, tensor in pairs:
        buffer = tensor.clone()
        yield name, buffer
        buffer.fill_(float("nan"))


def samples(sampler: Sampler) -> dict:
    return {name: plain(sampler.sample(PROMPTS, COPIES, sampling, SEEDS)) for name, sampling in SAMPLINGS.items()}


def random_state() -> tuple:
    return (
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
    )


def refusal(sampler: Sampler, incomplete: list[tuple[str, torch.Tensor]]) -> list[str]:
    """The errors of an incomplete set of weights and of sampling after it."""
    messages = []
    for attempt in (
        lambda: sampler.load_weights(incomplete),
        lambda: sampler.sample(PROMPTS, 1, SAMPLINGS["plain"], SEEDS),
    ):
        try:
            attempt()
        except (ModelError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def arrivals(sampler: Sampler) -> dict:
    """Every rollout of a call with the moment of its arrival, as a share of the call's time, and what it returned."""
    rows: list = []
    start = time.perf_counter()

    def arrived(index: int, copy: int, rollout: Rollout) -> None:
        random.random(), torch.rand(3)
        rows.append([index, copy, plain([[rollout]])[0][0], time.perf_counter() - start])

    returned = plain(sampler.sample(PROMPTS, COPIES, LONG, SEEDS, arrived))
    seconds = time.perf_counter() - start
    return {
        "rows": [[*row[:3], row[3] / seconds] for row in rows],
        "returned": returned,
        "silent": plain(sampler.sample(PROMPTS, COPIES, LONG, SEEDS)),
    }


def shared(sampler: Sampler) -> dict:
    """Several copies of long prompts, and with vLLM for each copy the tokens that it found in the cache."""
    prompts, cached = LONG_PROMPTS[:2], []
    if sampler.name == "vllm":
        engine = sampler._llm.llm_engine
        step = engine.step

        def counted() -> list:
            outputs = step()
            cached.extend(output.num_cached_tokens for output in outputs)
            return outputs

        engine.step = counted
    results = plain(sampler.sample(prompts, COPIES, Sampling(max_tokens=4), SEEDS[:2]))
    if sampler.name == "vllm":
        engine.step = step
    return {"rollouts": results, "cached": sorted(cached)}


def stopped(sampler: Sampler) -> list[str]:
    """The errors of three calls that end early: twice at the first arrival, once by a signal at any moment."""
    prompts, copies, sampling = CROWD
    kinds: list[type[BaseException]] = [KeyError, KeyboardInterrupt]

    def arrived(index: int, copy: int, rollout: Rollout) -> None:
        calls.append(index)
        raise kind("enough")

    messages = []
    for kind in kinds:
        calls: list[int] = []
        try:
            sampler.sample([PROMPTS[0]] * prompts, copies, sampling, range(prompts), arrived)
        except kind as error:
            messages.append(f"{type(error).__name__} {len(calls)}")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        # Some seconds of work, all of it in the engine.
        sampler.sample(PROMPTS, 64, Sampling(max_tokens=200), SEEDS)
    except KeyboardInterrupt:
        messages.append("signal")
    timer.cancel()
    return messages


def observe(engine: str, folder: Path, kind: str) -> dict:
    """All that one engine does with one model."""
    before = random_state()
    sampler = load(engine, folder / kind, max_length=256)
    results = {"name": sampler.name, "reason": sampler.reason, "before": samples(sampler)}
    results["again"] = samples(sampler)
    results["prefixed"] = {
        name: plain(sampler.sample(PROMPTS, COPIES, SAMPLINGS[name], SEEDS, prefixes=PREFIXES))
        for name in ("plain", "greedy")
    }
    results["apart"] = [
        plain(sampler.sample([prompt], COPIES, SAMPLINGS["plain"], [seed]))[0]
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    prompts, copies, sampling = CROWD
    start = time.perf_counter()
    results["crowd"] = plain(sampler.sample([PROMPTS[0]] * prompts, copies, sampling, range(prompts)))
    results["tokens_per_second"] = prompts * copies * sampling.max_tokens / (time.perf_counter() - start)
    results["long"] = plain(sampler.sample(LONG_PROMPTS, 1, Sampling(max_tokens=4), range(len(LONG_PROMPTS))))
    results["shared"] = shared(sampler)
    results["compiled"] = torch._dynamo.utils.counters["frames"]["total"]
    results["arrivals"] = arrivals(sampler)
    results["stopped"] = stopped(sampler)
    results["after_stop"] = samples(sampler)
    results["nothing"] = plain(sampler.sample([], COPIES, SAMPLINGS["plain"], []))
    results["state_kept"] = random_state() == before
    new = weights(folder / f"{kind}_new", with_head=False)
    sampler.load_weights(one_by_one(new))
    results["after"] = samples(sampler)
    sampler.load_weights(one_by_one(weights(folder / kind, with_head=True)))
    results["back"] = samples(sampler)
    results["refusal"] = refusal(sampler, new[:-1])
    sampler.load_weights(new)
    results["recovered"] = samples(sampler)
    sampler.close()
    results["group_left"] = torch.distributed.is_initialized()
    return results


def overridden(engine: str) -> dict:
    """TINY with OVERRIDES: rollouts, and with vLLM the configuration that its engine has."""
    sampler = load(engine, TINY, max_length=OVERRIDDEN_LENGTH, memory_fraction=0.05, overrides=OVERRIDES)
    results: dict = {"rollouts": plain(sampler.sample(PROMPTS, COPIES, SAMPLINGS["endless"], SEEDS))}
    if sampler.name == "vllm":
        engine_config = sampler._llm.llm_engine.model_config
        results["config"] = engine_config.hf_config.to_dict()
        results["max_model_len"] = engine_config.max_model_len
    sampler.close()
    return results


def repeat(engine: str, folder: Path, kind: str) -> dict:
    sampler = load(engine, folder / kind, max_length=256)
    return samples(sampler)


def shards(sampler: Sampler) -> list[int]:
    """The parameters of this rank's part of the engine, and the tokens of its cache."""
    engine = getattr(sampler, "engine", sampler)._llm.llm_engine
    (parameters,) = engine.apply_model(_parameters)
    cache = engine.vllm_config.cache_config
    return [parameters, cache.num_gpu_blocks * cache.block_size]


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def failure(sampler: Sampler, rank: int, prompts: Sequence, seeds: Sequence[int]) -> str:
    """The error of a call in which rank 1 raises one at its first response."""

    def arrived(index: int, copy: int, rollout: Rollout) -> None:
        if rank == 1:
            raise KeyError("enough")

    try:
        sampler.sample(prompts, COPIES, SAMPLINGS["plain"], seeds, arrived)
    except (KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def ranks(folder: Path, tensor_parallel: int) -> list[dict]:
    """vLLM on every rank with prompts of its own, before and after a refresh; what each rank saw, on every rank."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    sampler = load("vllm", folder / "tied", max_length=256, tensor_parallel=tensor_parallel)
    results = {"reason": sampler.reason, "before": [], "after": [], "shards": shards(sampler)}
    if tensor_parallel > 1:
        results["failure"] = failure(sampler, rank, PROMPTS[rank:], SEEDS[rank:])
    for stage in ("before", "after"):
        for split in RANK_PROMPTS:
            seeds = SEEDS[: len(split[0])] if rank == 0 else SEEDS[len(split[0]) :]
            results[stage].append(plain(sampler.sample(split[rank], COPIES, SAMPLINGS["plain"], seeds)))
        sampler.load_weights(one_by_one(weights(folder / "tied_new", with_head=False)))
    gathered: list = [None] * torch.distributed.get_world_size()
    results["compiled"] = torch._dynamo.utils.counters["frames"]["total"]
    torch.distributed.all_gather_object(gathered, results)
    torch.distributed.barrier()
    return gathered


def main(job: str, *arguments: str) -> None:
    output = Path(arguments[-1])
    if job == "ranks":
        results = ranks(Path(arguments[0]), int(arguments[1]))
        if os.environ["RANK"] != "0":
            os._exit(0)
    elif job == "greedy":
        prompts = json.loads(Path(arguments[2]).read_text(encoding="utf-8"))
        sampler = load(arguments[0], arguments[1], max_length=128)
        groups = sampler.sample(prompts, 1, Sampling(temperature=0, max_tokens=16), range(len(prompts)))
        results = [list(group[0].token_ids) for group in groups]
    else:
        engine, folder = arguments[0], Path(arguments[1])
        look, kinds = (observe, KINDS) if job == "observe" else (repeat, KINDS[:1])
        results = {kind: look(engine, folder, kind) for kind in kinds}
        if job == "observe":
            results["overridden"] = overridden(engine)
    output.write_text(json.dumps(results), encoding="utf-8")
    sys.stdout.flush()
    # Not by returning: vLLM's own clean-up at exit now and then aborts a process that has done all its work.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

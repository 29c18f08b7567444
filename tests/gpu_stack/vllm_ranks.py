"""Run on two ranks by test_vllm_ranks.py: vLLM for CUDA with one engine over both, on pretended GPUs.

usage: vllm_ranks.py FOLDER OUTPUT

FOLDER holds the models `old` and `new`. OUTPUT gets what both ranks saw, from torch.save.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.gpu_stack import pretended  # before vLLM
from tests.rollout_ranks import one_by_one, plain, weights
from upge import rollout
from upge.rollout.base import Sampling
from upge.train.distributed import leave

#: Prompts and seeds by rank.
PROMPTS = (((5, 7, 9), (11,)), (tuple(range(3, 40)),))
SEEDS = ((1, 2), (3,))
COPIES, SAMPLING = 4, Sampling(max_tokens=12, stop_token_ids=(1,))


def observe(folder: Path) -> list[dict]:
    """What each rank sees. It is gathered here, because the end of the engine destroys the process group."""
    rank = dist.get_rank()
    sampler = rollout.load(
        "vllm",
        folder / "old",
        dtype="bfloat16",
        device="cuda",
        max_length=96,
        memory_fraction=0.1,
        tensor_parallel=2,
    )
    engine = sampler.engine._llm.llm_engine
    worker = engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert isinstance(worker, pretended.CPUWorker)
    spec = next(iter(worker.get_kv_cache_spec().values()))
    results = {
        "reason": sampler.reason,
        "ranks": (worker.rank, worker.local_rank, worker.parallel_config.world_size),
        "backend": worker.parallel_config.distributed_executor_backend,
        "key_heads": spec.num_kv_heads,
        "shards": {"old": shards(worker)},
    }
    addresses = {name: tensor.data_ptr() for name, tensor in worker.model.state_dict().items()}
    results["rollouts"] = plain(sampler.sample(PROMPTS[rank], COPIES, SAMPLING, SEEDS[rank]))
    worker.calls.clear()
    sampler.sleep()
    sampler.load_weights(one_by_one(weights(folder / "new", with_head=False)))
    results["calls"], results["shards"]["new"] = list(worker.calls), shards(worker)
    results["addresses_kept"] = {n: t.data_ptr() for n, t in worker.model.state_dict().items()} == addresses
    results["after"] = plain(sampler.sample(PROMPTS[rank], COPIES, SAMPLING, SEEDS[rank]))
    rows: list = [None, None]
    dist.all_gather_object(rows, results)
    dist.barrier()
    return rows


def shards(worker: pretended.CPUWorker) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in worker.model.named_parameters()}


def main(folder: str, output: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = observe(Path(folder))
    if rank == 0:
        torch.save(rows, output)
    leave(None, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What DeepSpeed, torch and vLLM allocate in the parts of a step, for `tests/experiments/test_planner_measured.py`.

Run as `python -m tests.planner_ranks FOUND` in one process; it writes a JSON file.
"""

from __future__ import annotations

import json
import sys
import tempfile
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import upge.train.engine as engine_module
from experiments.config import MODELS
from upge.train.config import ModelConfig, OptimizerConfig
from upge.train.distributed import World, connect, leave
from upge.train.engine import Engine


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made in the block that exist at the same time: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage._cdata
        self._known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def step(engine: Engine) -> dict[str, Any]:
    """An update: the peak of AdamW's step, the buckets of gradients, and a checkpoint's and an export's bytes."""
    for _ in range(2):  # the first update makes the moments, which are no temporary tensors
        engine.backward(-engine.forward([([5] * 8, [6] * 20)] * 4).sum(), last=True)
        with Allocations() as allocations:
            engine.step(1e-4)
    buckets = [(str(b.buffer.dtype), b.buffer.numel()) for b in engine._engine.optimizer.ipg_buckets.values()]
    results = {"parameters": engine.parameters, "step": allocations.peak, "buckets": buckets}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine.save(folder, "one", {})
        engine.use_optimizer("second")
        engine.backward(-engine.forward([([5] * 8, [6] * 20)]).sum(), last=True)
        engine.step(1e-4)
        engine.save(folder, "two", {})
        engine.export(folder / "final")
        for part in ("one", "two", "final"):
            results[part] = sum(file.stat().st_size for file in (folder / part).rglob("*") if file.is_file())
    return results


def gathered(engine: Engine, limit: int) -> int:
    """The largest number of bytes that `named_weights` gathers at a time, with buckets of `limit` bytes."""
    import deepspeed

    sizes: list[int] = []
    real = deepspeed.zero.GatheredParameters

    def gather(parameters: list[Any], **options: Any) -> Any:
        sizes.append(sum(p.ds_numel * p.element_size() for p in parameters))
        return real(parameters, **options)

    with (
        patch.object(engine_module, "_BUCKET_BYTES", limit),
        patch.object(deepspeed.zero, "GatheredParameters", gather),
    ):
        for _ in engine.named_weights():
            pass
    return max(sizes)


def reduction() -> dict[str, int]:
    """What the reduction of a bucket with two gradients allocates, and its bytes."""
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    gradients = [torch.randn(1000, 7), torch.randn(3001)]
    with Allocations() as allocations:
        reduce_scatter_coalesced(gradients, torch.distributed.group.WORLD)
    return {"peak": allocations.peak, "bucket": sum(g.nbytes for g in gradients)}


def refresh() -> dict[str, int]:
    """What vLLM on a CPU allocates while its weights are replaced, and twice its largest layer, a joined MLP."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from experiments.run.model_shape import ModelShape
    from upge.rollout.vllm_engine import VLLMSampler

    sizes = dict(hidden_size=128, intermediate_size=1024, num_attention_heads=2, num_key_value_heads=1)
    config = Qwen2Config(vocab_size=256, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    model = Qwen2ForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sampler = VLLMSampler(folder, dtype="float32", max_length=64, memory_fraction=0.1)
    with Allocations() as allocations:
        sampler.load_weights(model.named_parameters())
    sampler.close()
    return {"peak": allocations.peak, "twice": 2 * ModelShape.of(config, "float32").engine_layer}


def main(world: World, target: Path) -> None:
    """Measures everything and writes it to `target`."""
    results: dict[str, Any] = {"reduction": reduction()}
    for dtype in ("bfloat16", "float32"):
        engine = Engine(ModelConfig(path=str(MODELS / "tiny"), dtype=dtype), OptimizerConfig(), world)
        results[dtype] = step(engine)
        results[dtype]["gathered"] = {limit: gathered(engine, limit) for limit in (2**16, 2**18, 2**29)}
    if torch.version.cuda is None and find_spec("vllm"):
        results["refresh"] = refresh()
    target.write_text(json.dumps(results))


if __name__ == "__main__":
    the_world = connect()
    main(the_world, Path(sys.argv[1]))
    leave(the_world, 0)

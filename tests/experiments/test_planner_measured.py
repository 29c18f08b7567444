"""What the planner counts, against what DeepSpeed, torch and the files of a small run take."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import upge.train.engine as engine_module
from experiments.config import MODELS, compose
from experiments.run.disk import Disk
from experiments.run.memory import ADAMW_BYTES, checkpoint_bytes, states
from experiments.run.memory_items import Shapes
from experiments.run.model_shape import ModelShape
from experiments.run.workload import planned
from tests.forked import run
from tests.planner_ranks import Allocations
from upge.models.loading import read_config
from upge.train.config import HardwareConfig

dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    target = tmp_path_factory.mktemp("planner") / "found.json"
    done = run("tests.planner_ranks", str(target), environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


def tiny(dtype: str) -> ModelShape:
    return ModelShape.of(read_config(MODELS / "tiny"), dtype)


def item(dtype: str, words: str, hardware: HardwareConfig | None = None) -> int:
    """Bytes of the item whose description has these words, for one rank."""
    composed, machine = compose([]), planned(hardware or HardwareConfig())
    items = states(composed.config, composed.algorithm, Shapes(tiny(dtype)), machine)
    (one,) = [i for i in items if words in i.what]
    return one.bytes


@dtypes
def test_adamws_step(results, dtype):
    assert results[dtype]["parameters"] == tiny(dtype).parameters
    assert item(dtype, "optimizer step") == pytest.approx(results[dtype]["step"], rel=0.03)


def test_adamws_temporary_tensors_on_a_gpu():
    """Torch updates tensors on a GPU with `foreach`, which runs on a CPU as well; here on tensors without data."""
    weight = torch.nn.Parameter(torch.zeros(10_000, device="meta"))
    weight.grad = torch.zeros_like(weight)
    for foreach, bytes_each in ((True, ADAMW_BYTES["cuda"]), (False, ADAMW_BYTES["cpu"])):
        optimizer = torch.optim.AdamW([weight], foreach=foreach)
        optimizer.step()  # makes the moments
        with Allocations() as allocations:
            optimizer.step()
        assert allocations.peak == pytest.approx(bytes_each * 10_000, rel=0.01), foreach
    eight = planned(HardwareConfig(gpus=1, memory=80.0))
    composed = compose([])
    items = states(composed.config, composed.algorithm, Shapes(tiny("bfloat16")), eight)
    (step,) = [i for i in items if i.when == "step"]
    assert step.bytes == 8 * tiny("bfloat16").parameters


@dtypes
def test_the_bucket_of_gradients_is_float32(results, dtype):
    assert results[dtype]["buckets"] == [["torch.float32", 500_000_000]]
    on_a_gpu = HardwareConfig(gpus=1, memory=80.0)
    assert item(dtype, "bucket of gradients", on_a_gpu) == 4 * 500_000_000
    assert item(dtype, "bucket of gradients") == 4 * tiny(dtype).parameters  # what is written of it


def test_the_reduction_copies_its_bucket_once(results):
    assert results["reduction"]["peak"] == results["reduction"]["bucket"]
    assert item("bfloat16", "order of the ranks") == 4 * tiny("bfloat16").parameters


@dtypes
def test_the_largest_bucket_of_gathered_weights(results, dtype, monkeypatch):
    for limit, largest in results[dtype]["gathered"].items():
        monkeypatch.setattr(engine_module, "_BUCKET_BYTES", int(limit))
        assert tiny(dtype).gathered == largest, limit
    assert len(set(results[dtype]["gathered"].values())) > 1


def test_vllm_copies_its_largest_layer_twice(results):
    if "refresh" not in results:
        pytest.skip("needs vLLM for CPUs")
    assert results["refresh"]["peak"] == results["refresh"]["twice"] == 2 * 4 * 2 * 128 * 1024


@dtypes
def test_the_bytes_of_checkpoints_and_of_the_final_weights(results, dtype):
    """Stage 3 writes no weights in half precision: 12 bytes per parameter, not 14."""
    parameters = tiny(dtype).parameters
    assert results[dtype]["one"] == pytest.approx(checkpoint_bytes(parameters), rel=0.01)
    assert results[dtype]["two"] == pytest.approx(checkpoint_bytes(parameters, moments=2), rel=0.01)
    disk = Disk.of(compose([]).config, compose([]).algorithm, Shapes(tiny(dtype)))
    assert disk.checkpoint == checkpoint_bytes(parameters)
    assert disk.model == pytest.approx(results[dtype]["final"], rel=0.01)


def test_a_loaded_checkpoint_is_mapped_and_not_copied(tmp_path):
    """All ranks of a machine share the pages of the files, which is why loading is no item of its main memory."""
    from safetensors.torch import save_file
    from transformers.modeling_utils import load_state_dict

    def own_mib() -> float:
        (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon")]
        return int(line.split()[1]) / 1024

    save_file({"weight": torch.zeros(50_000_000)}, tmp_path / "model.safetensors")
    before = own_mib()
    weights = load_state_dict(tmp_path / "model.safetensors")
    assert float(weights["weight"].sum()) == 0.0
    assert own_mib() - before < 50  # of 191

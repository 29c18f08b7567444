"""Whole runs with LoRA: what they leave, on one and two ranks, and how they are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import MODELS, compose
from experiments.diagnose import settings
from experiments.diagnose.sampling import policies
from experiments.run.memory_check import outlook
from experiments.run.workload import Machine
from tests.running import SMALL, lines, run
from upge.errors import ConfigError

pytestmark = pytest.mark.slow

LORA = ("model.lora.rank=4", "steps=3", "optimizer.lr=1e-2", "eval.every=-1", "verify.workers=1", *SMALL)


@pytest.mark.parametrize(
    ("arguments", "ranks"), [(["algo=sft"], 1), (["algo=grpo", "correction=kl_k3"], 2), (["algo=hpt"], 1)]
)
def test_a_run_trains_the_adapters(tmp_path, arguments, ranks):
    """The sampler has the trainer's merged weights, the KL is to the base model, and the rest of the model stays."""
    out = tmp_path / "run"
    run(*arguments, *LORA, f"output={out}", ranks=ranks)
    metrics = lines(out / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in metrics) and len(metrics) == 3
    if arguments != ["algo=sft"]:
        assert all(row["sampler/logprob_diff_max"] < 1e-3 for row in metrics)
    if "correction=kl_k3" in arguments:
        assert metrics[0]["kl/value"] == 0 and metrics[-1]["kl/value"] > 1e-6
    base, final = (load_file(folder / "model.safetensors") for folder in (MODELS / "tiny", out / "final"))
    changed = {name for name, values in base.items() if not torch.equal(final[name], values)}
    assert set(final) == set(base) and changed == {name for name in base if name.endswith("_proj.weight")}
    assert (out / "final" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_is_continued_and_read_by_the_diagnosis(tmp_path):
    """The checkpoint holds the adapters; added to the base model they are what the run exports."""
    arguments = ["algo=sft", *LORA, "checkpoint.every=2", "checkpoint.keep=0"]
    run(*arguments, f"output={tmp_path / 'whole'}")
    run(*arguments, "steps=2", f"output={tmp_path / 'parts'}")
    (tmp_path / "parts" / "final").rename(tmp_path / "first")
    done = run(*arguments, f"output={tmp_path / 'parts'}")
    assert "continuing" in done.stdout
    finals = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(finals[1][name], values) for name, values in finals[0].items())
    chosen = settings.choose([f"run={tmp_path / 'whole'}", "algos=[sft]"])
    with policies(chosen) as actual:
        assert [one.label for one in actual] == ["0", "2", "3"]
        unpacked = [load_file(f"{one.model.path}/model.safetensors") for one in actual[1:]]
    first = load_file(tmp_path / "first" / "model.safetensors")
    for ours, theirs in zip(unpacked, (first, finals[0]), strict=True):
        assert all(torch.allclose(ours[name], values, atol=1e-7) for name, values in theirs.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.lora.rank=-1"], "model.lora.rank: found -1; it must not be negative"),
        (["model.lora.alpha=0"], "model.lora.alpha: found 0.*greater than 0"),
        (["model.lora.dropout=1"], r"model.lora.dropout: found 1.*\[0, 1\)"),
        (["model.lora.ranks=4"], "model.lora.ranks: unknown key; did you mean 'model.lora.rank'"),
        (["model.lora.rank=4", "model.lora.target_modules=[q]"], "model.lora.target_modules: found 'q'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        outlook(compose(arguments), Machine(1, 8 * 2**30, False, "stated", False))


def test_the_planner_leaves_out_what_is_offloaded():
    """16 of the 18 bytes per parameter, and the weights also, are then in the machine's memory."""
    machine = Machine(1, 80 * 2**30, True, "stated", False)
    arguments = ["algo=sft", "model=qwen2.5-math-7b", f"model.path={MODELS}/qwen2.5-math-7b"]
    with pytest.raises(ConfigError, match="deepspeed.offload=optimizer or model.lora.rank"):
        outlook(compose(arguments), machine)
    sizes = []
    for offload in ("optimizer", "all"):
        expected = outlook(compose([*arguments, f"deepspeed.offload={offload}"]), machine)
        sizes.append(expected.memory.states[0].bytes)
    assert not any(item.when == "step" for item in expected.memory.states)
    shape = expected.shapes.policy
    assert sizes == [2 * shape.parameters + 4 * shape.largest_layer, 4 * shape.largest_layer]
    smaller = "deepspeed.config.zero_optimization.reduce_bucket_size=1000"
    buckets = [
        outlook(compose([*arguments, "deepspeed.offload=all", *more]), machine).memory for more in ([], [smaller])
    ]
    assert buckets[0].total("training") - buckets[1].total("training") == 4 * (500_000_000 - 1000)


def test_the_planner_counts_the_adapters_and_no_second_copy():
    """7B with LoRA and a KL penalty fits one GPU, which 16 bytes per weight would not."""
    machine = Machine(1, 80 * 2**30, True, "stated", False)
    arguments = ["algo=grpo", "correction=kl_k3", "model=qwen2.5-math-7b", f"model.path={MODELS}/qwen2.5-math-7b"]
    with pytest.raises(ConfigError, match="weights, gradients and AdamW"):
        outlook(compose(arguments), machine)
    expected = outlook(compose([*arguments, "model.lora.rank=16"]), machine)
    assert (
        next(item for item in expected.memory.states if item.when == "step").bytes == 8 * expected.shapes.policy.adapter
    )
    assert expected.disk.checkpoint == 12 * expected.shapes.policy.adapter
    # 40.4 M parameters: rank 16 in the seven layers of each of 28 blocks.
    assert expected.shapes.policy.adapter == 28 * 16 * (4 * 3584 + 2 * 3584 + 2 * 512 + 3 * (3584 + 18944))
    assert expected.shapes.reference is None
    base = 2 * expected.shapes.policy.parameters
    states = sum(item.bytes for item in expected.memory.states if item.is_certain and item.when == "always")
    assert base + 16 * expected.shapes.policy.adapter < states < base + 6 * 2**30
    assert not any("output embedding" in item.what for item in expected.memory.update)

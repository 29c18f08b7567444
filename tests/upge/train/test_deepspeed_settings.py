"""DeepSpeed's configuration: what a run may add to it, what is refused, and ZeRO++'s secondary partition."""

from __future__ import annotations

import pytest
import torch

from experiments.config import compose
from experiments.run.models import check_secondary_partition
from tests.models import save_random_model
from tests.upge.train.test_update import launch
from upge.errors import ConfigError
from upge.train.deepspeed_settings import OWNED, DeepspeedConfig, settings
from upge.train.distributed import World

ZERO = "zero_optimization"


def world(size: int) -> World:
    return World(0, size, torch.device("cpu"))


def test_given_keys_are_merged_and_ours_stay():
    given = {"memory_breakdown": True, ZERO: {"reduce_bucket_size": 5, "offload_param": {"max_in_cpu": 7}}}
    tree = settings("bfloat16", world(2), DeepspeedConfig("all", given), max_grad_norm=0.5)
    assert tree["memory_breakdown"] is True and tree[ZERO]["reduce_bucket_size"] == 5 and tree[ZERO]["stage"] == 3
    assert tree[ZERO]["offload_param"] == {"max_in_cpu": 7, "pin_memory": True, "device": "cpu"}
    assert tree[ZERO]["offload_optimizer"] == {"pin_memory": True, "device": "cpu"}
    assert tree["gradient_clipping"] == 0.5 and tree["communication_data_type"] == "fp32"
    assert "offload_param" not in settings("float32", world(1), DeepspeedConfig("optimizer"))[ZERO]
    composed = compose(["deepspeed.config.zero_optimization.reduce_bucket_size=9", "deepspeed.offload=all"])
    assert composed.config.deepspeed == DeepspeedConfig("all", {ZERO: {"reduce_bucket_size": 9}})


def nested(name: str) -> dict:
    first, _, rest = name.partition(".")
    return {first: nested(rest)} if rest else {first: 1}


@pytest.mark.parametrize("name", OWNED)
def test_what_the_trainer_sets_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"config: '{name}' cannot be given here; "):
        DeepspeedConfig("all", nested(name))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({ZERO: {"zero_quantized_gradients": True}}, "'zero_optimization.zero_quantized_gradients' .* the gradient"),
        ({"gradient_predivide_factor": 2.0}, "'gradient_predivide_factor' does not exist or may change the gradient"),
        ({ZERO: {"reduce_bucket_sise": 1}}, "did you mean 'reduce_bucket_size'"),
        ({ZERO: 3}, "zero_optimization: found 3, expected a mapping"),
        ({ZERO: {"offload_param": {"max_in_cpu": 1}}}, "no effect with deepspeed.offload=none.*offload=all"),
    ],
)
def test_other_keys_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        DeepspeedConfig(config=config)


def test_values_are_checked():
    with pytest.raises(ConfigError, match="deepspeed.config: zero_optimization.reduce_bucket_size: found -1"):
        settings("float32", world(1), DeepspeedConfig(config={ZERO: {"reduce_bucket_size": -1}}))
    secondary = DeepspeedConfig(config={ZERO: {"zero_hpz_partition_size": 2}})
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: found 2, which does not divide the 3 ranks"):
        settings("float32", world(3), secondary)
    for arguments in (["algo=ppo"], ["algo=grpo", "correction=kl_k3"]):
        setting = "deepspeed.config.zero_optimization.zero_hpz_partition_size=2"
        with pytest.raises(ConfigError, match="zero_hpz_partition_size: DeepSpeed supports it for only one model"):
            check_secondary_partition(compose([*arguments, setting]))
        check_secondary_partition(compose(arguments))
        check_secondary_partition(compose(["algo=grpo", setting]))


def test_a_secondary_partition_changes_no_bit(tmp_path):
    model, actual = save_random_model(tmp_path / "model"), []
    for size in (1, 2):
        launch("secondary_ranks", 2, model, tmp_path / f"{size}.pt", size)
        actual.append(torch.load(tmp_path / f"{size}.pt"))
    without, one = actual
    assert without["secondary"] == 0 and one["secondary"] > 0
    for key in ("gradient", "weights"):
        assert all(torch.equal(one[key][name], values) for name, values in without[key].items()), key

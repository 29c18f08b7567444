"""What a run will take, against numbers worked out by hand and against what autograd keeps."""

from __future__ import annotations

import gc
import json
import textwrap
from dataclasses import replace

import pytest
import torch

import algorithms
from experiments.config import CONFIGS, MODELS, compose, presets
from experiments.run import dry_run
from experiments.run.dry_run import balances
from experiments.run.memory_check import outlook
from experiments.run.model_shape import ModelShape
from experiments.run.workload import GIB, planned
from upge.errors import ConfigError, ModelError
from upge.models.loading import read_config

#: width, layers, heads, key heads, MLP, vocabulary, tied, biases of query, key and value.
SIZES = {
    "qwen2.5-math-7b": (3584, 28, 28, 4, 18944, 152064, False, True),
    "qwen2.5-math-1.5b": (1536, 28, 12, 2, 8960, 151936, True, True),
    "llama-3.1-8b": (4096, 32, 32, 8, 14336, 128256, False, False),
}
EIGHT = ("hardware.gpus=8", "hardware.memory=79")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """Whatever models this machine has."""

    def local(path, overrides=None):
        if path in dry_run.KNOWN:
            raise ModelError(f"model.path={path}: neither a folder nor a model that can be found here")
        return read_config(path, overrides)

    monkeypatch.setattr(dry_run, "read_config", local)


def shape(name: str, dtype: str = "bfloat16") -> ModelShape:
    return ModelShape.of(read_config(MODELS / name), dtype)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted(name):
    hidden, layers, heads, keys, inner, vocabulary, tied, biased = SIZES[name]
    narrow = hidden // heads * keys
    attention = 2 * hidden * hidden + 2 * hidden * narrow + (hidden + 2 * narrow if biased else 0)
    layer = attention + 3 * hidden * inner + 2 * hidden
    expected = layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)
    actual = shape(name)
    assert actual.parameters == expected and actual.largest_layer == vocabulary * hidden
    assert actual.output == (0 if tied else vocabulary * hidden)
    assert actual.size == {"qwen2.5-math-7b": "7.62 B", "qwen2.5-math-1.5b": "1.54 B", "llama-3.1-8b": "8.03 B"}[name]
    assert actual.cache_per_token == 2 * layers * narrow * 2


def test_the_shipped_configurations_are_small_and_have_the_published_positions():
    for name, positions in {"qwen2.5-math-7b": 4096, "qwen2.5-math-1.5b": 4096, "llama-3.1-8b": 131072}.items():
        files = list((MODELS / name).iterdir())
        assert [file.name for file in files] == ["config.json"] and files[0].stat().st_size < 2000
        config = json.loads(files[0].read_text())
        assert config["max_position_embeddings"] == positions
        rope = config["rope_parameters"]
        assert rope["rope_theta"] == (500000.0 if "llama" in name else 10000.0)
        if "llama" in name:
            scaling = [rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")]
            assert scaling == [8.0, 1.0, 4.0] and rope["original_max_position_embeddings"] == 8192


#: Parameters of the models' published weights, tied ones counted once.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize(("hub", "folder"), dry_run.KNOWN.items())
def test_every_preset_of_the_hub_has_its_models_sizes(hub, folder):
    """The preset, the folder and the hub name belong together, and the count is that of the published weights."""
    preset = compose([f"model={folder}"]).config
    assert preset.model.path == hub and preset.model.dtype == "bfloat16"
    config = read_config(MODELS / folder, preset.model.overrides)
    size = folder.removesuffix("-base").removesuffix("-instruct").removesuffix("-it")
    assert ModelShape.of(config, "bfloat16").parameters == PUBLISHED[size]
    longest = preset.rollout.max_prompt_tokens + preset.rollout.max_response_tokens
    assert config.max_position_embeddings >= longest
    assert ("reasoning model" in (CONFIGS / "model" / f"{folder}.yaml").read_text()) == (preset.model.path in THINKING)
    assert (MODELS / folder / "config.json").stat().st_size < 2000


#: Models whose chat template has the variable `enable_thinking`.
THINKING = {f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")} | {"HuggingFaceTB/SmolLM3-3B"}


def test_every_preset_is_planned_without_the_hub():
    here = {"tiny", "smollm2-135m"}  # in the repository and in a package
    assert set(presets("model")) - here == set(dry_run.KNOWN.values())
    assert {folder.name for folder in MODELS.iterdir()} - here == set(dry_run.KNOWN.values())


# Memory.


def expected_memory(*arguments: str):
    composed, _ = dry_run.with_known_models(compose(list(arguments)))
    return outlook(composed, planned(composed.config.hardware))


def test_memory_by_hand():
    """The 7B model on 8 GPUs of 79 GiB with full checkpointing: every line."""
    full = ("model.gradient_checkpointing=full", "optimizer.micro_batch_tokens=32768")
    actual = expected_memory("recipe=hpt-qwen2.5-math-7b", *full).memory
    parameters, embedding, tokens, layers, hidden = 7_615_616_512, 152064 * 3584, 32768, 28, 3584
    states = 18 * parameters // 8 + 4 * embedding
    bucket, ordered, gathered, reserve = 4 * 500_000_000, 4 * embedding, 2 * 1_000_000_000, int(1.5 * GIB)
    step = 8 * (parameters // 8)
    assert [item.bytes for item in actual.states] == [states, bucket, ordered, gathered, step, reserve]
    share, graphs, weights, one_bucket, copies = actual.engine
    assert share.bytes + graphs.bytes == int(0.6 * 79 * GIB) and graphs.bytes == GIB
    cache = 2 * 28 * 4 * 128 * 2 * (1024 + 8192)
    assert f"a cache of {(share.bytes - 2 * parameters) // cache} sequences of 9,216 tokens" in share.what
    last = 2 * (3 * hidden + embedding)  # the last norms and the output embedding
    assert (weights.bytes, one_bucket.bytes, copies.bytes) == (2 * parameters, last, 4 * embedding)
    one_layer = (9 * hidden + 2 * hidden + 2 * 512 + 4 * 18944) * 2 * tokens
    update = [layers * hidden * 2 * tokens, one_layer, 3 * 18944 * 2 * tokens]
    update += [(4096 * 2 + 512 * (4 + 4)) * 152064, (4 + 2) * embedding]
    assert [item.bytes for item in actual.update] == update
    always = states + bucket + reserve + graphs.bytes
    assert actual.total("sampling") == always + share.bytes
    assert actual.total("refresh") == always + 2 * parameters + one_bucket.bytes + copies.bytes
    assert actual.total("training") == always + ordered + gathered + sum(update)
    assert actual.total("step") == always + step
    assert [item.bytes for item in actual.host] == [12 * parameters, 2 * parameters]


def test_the_memory_in_the_docs_is_the_recipes():
    memory = expected_memory("recipe=hpt-qwen2.5-math-7b").memory
    page = (MODELS.parent.parent / "docs" / "recipes.md").read_text("utf-8")
    shown = page.split("memory of a rank, GiB:\n")[1].split("```")[0]
    assert textwrap.dedent(shown).strip().splitlines() == textwrap.dedent(str(memory)).strip().splitlines()


def test_an_engine_over_four_gpus_by_hand():
    """The 7B model: a rank has a quarter of the weights and one of 4 key heads. The trainer's states are unchanged."""
    recipe = "recipe=hpt-qwen2.5-math-7b"
    whole, actual = (expected_memory(recipe, *more).memory for more in ((), ("rollout.tensor_parallel=4",)))
    assert actual.states == whole.states and actual.update == whole.update
    share, graphs, weights, one_bucket, copies = actual.engine
    parameters, embedding = 7_615_616_512, 152064 * 3584
    assert (share.bytes, graphs.bytes) == (whole.engine[0].bytes, GIB) and one_bucket == whole.engine[3]
    assert weights.bytes == 2 * parameters // 4
    cache = 2 * 28 * 128 * 2 * (1024 + 8192)
    sequences = (share.bytes - 2 * parameters // 4) // cache
    assert f"1/4 of the weights and a cache of {sequences} sequences of 9,216 tokens" in share.what
    assert copies.bytes == 2 * embedding + embedding // 2
    # With more ranks than key heads each rank has one of them.
    few = replace(shape("qwen2.5-math-7b"), key=2 * 128)
    assert few.of_engine(4).cache_per_token == 2 * 28 * 128 * 2


def test_an_engine_over_two_gpus_needs_a_smaller_share():
    """Half of the weights, and half of the cache of a sequence."""
    small = ("recipe=hpt-qwen2.5-math-7b", "rollout.memory_fraction=0.1")
    with pytest.raises(ConfigError, match="rollout.memory_fraction: 0.1"):
        expected_memory(*small)
    assert expected_memory(*small, "rollout.tensor_parallel=2")


def test_states_are_deepspeeds_own_estimate():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    one = shape("llama-3.1-8b")
    _, theirs, _ = estimate_zero3_model_states_mem_needs(
        one.parameters, one.largest_layer, num_gpus_per_node=8, num_nodes=1, cpu_offload=False, cpu_offload_params=False
    )
    assert expected_memory("recipe=hpt-llama-3.1-8b").memory.states[0].bytes == theirs


def test_critic_reference_policy_and_a_second_set_of_moments_are_counted():
    ppo = expected_memory("algo=ppo", "model=qwen2.5-math-1.5b", *EIGHT).memory
    names = [item.what.split(":")[0] for item in ppo.states]
    assert names.count("policy") == 4 and names.count("critic") == 4 and names.count("reference policy") == 1
    critic = next(item for item in ppo.states if item.what.startswith("critic: weights, gradient"))
    assert critic.bytes == ppo.states[0].bytes  # tied: the trunk is the whole model
    reference = next(item for item in ppo.states if item.what.startswith("reference"))
    assert reference.bytes == 2 * 1_543_714_304 // 8
    untied = expected_memory("algo=ppo", "model=qwen2.5-math-7b", *EIGHT).memory
    critic = next(item for item in untied.states if item.what.startswith("critic: weights, gradient"))
    assert untied.states[0].bytes - critic.bytes == 18 * 7_615_616_512 // 8 - 18 * (7_615_616_512 - 152064 * 3584) // 8
    relift = expected_memory("algo=relift", "model=qwen2.5-math-1.5b", *EIGHT).memory
    assert any("interleaved update" in item.what and item.bytes == 1_543_714_304 for item in relift.states)


def test_earlier_weights_and_kept_rollouts_are_counted_in_the_main_memory():
    """With rollout.lag=3 four copies of the weights, of all ranks together; a replay buffer on each rank."""
    plain, stale = (
        expected_memory("algo=grpo", "model=qwen2.5-math-1.5b", f"rollout.lag={lag}", *EIGHT).memory for lag in (0, 3)
    )
    copies = 4 * 2 * 1_543_714_304
    assert plain.remembered == () and [item.bytes for item in stale.remembered] == [copies]
    assert stale.host_peak - plain.host_peak == copies and "rollout.lag=3" in str(stale)
    limits = ("rollout.max_prompt_tokens=100", "rollout.max_response_tokens=300", "algo.replay.size=10")
    (item,) = expected_memory("algo=exgrpo", "model=qwen2.5-math-1.5b", *limits, *EIGHT).memory.remembered
    assert item.bytes == 8 * 10 * 400 * 100


def test_offloaded_states_are_counted_in_the_main_memory_of_each_machine():
    """By DeepSpeed: 16 bytes a parameter, or 18 with the weights, and half of that again for buffers."""
    parameters = 1_543_714_304
    plain = expected_memory("algo=ppo", "model=qwen2.5-math-1.5b", *EIGHT).memory
    assert plain.offloaded == () and plain.host_peak == 12 * 2 * parameters
    for offload, each, kept in (("optimizer", 24, 2), ("all", 27, 3)):
        changed = ("algo=ppo", "model=qwen2.5-math-1.5b", f"deepspeed.offload={offload}", *EIGHT)
        memory = expected_memory(*changed).memory
        assert [item.bytes for item in memory.offloaded] == [each * parameters, each * parameters, 2 * parameters][
            :kept
        ]
        assert memory.host_peak == sum(item.bytes for item in memory.offloaded) + 12 * 2 * parameters
        assert "keeps, DeepSpeed's estimate" in str(memory)
    adapters = ("model=qwen2.5-math-1.5b", "model.lora.rank=16", "deepspeed.offload=all", *EIGHT)
    (item,) = expected_memory(*adapters).memory.offloaded
    trained = 28 * 16 * (2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960))
    assert item.bytes == 27 * trained + 2 * parameters


def test_a_second_partition_of_the_weights_and_the_merging_of_adapters_are_counted():
    again = "deepspeed.config={zero_optimization: {zero_hpz_partition_size: 4}}"
    first, second = (expected_memory("model=qwen2.5-math-7b", *more, *EIGHT).memory.states for more in ((), (again,)))
    (more,) = [item for item in second if item.what not in {other.what for other in first}]
    assert more.bytes == 2 * 7_615_616_512 // 4 and more.when == "always"
    refresh = [item for item in expected_memory("model=qwen2.5-math-7b", "model.lora.rank=16", *EIGHT).memory.engine]
    (merging,) = [item.bytes for item in refresh if "to merge an adapter" in item.what]
    (plain,) = [i.bytes for i in expected_memory("model=qwen2.5-math-7b", *EIGHT).memory.engine if "bucket" in i.what]
    # A copy of a matrix of the MLP in float32, and the sum. The largest bucket has no adapter.
    assert merging - plain == (4 + 4) * 18944 * 3584


def test_fewer_sequences_take_fewer_graphs():
    """Sizes 1, 2, 4, 8, 16, ..., 64 of the 51 sizes."""
    memory = expected_memory("model=qwen2.5-math-7b", "rollout.max_sequences=32", *EIGHT).memory
    (graphs,) = [item.bytes for item in memory.engine if "CUDA graphs" in item.what]
    assert graphs == GIB * 11 // 51


def test_engines_that_do_not_sleep_are_there_all_the_time():
    actual = expected_memory("model=qwen2.5-math-1.5b", "rollout.engine=transformers", *EIGHT).memory
    copy, _, cache = actual.engine
    assert (copy.bytes, copy.when) == (2 * 1_543_714_304, "always")
    assert cache.bytes == 262144 * 2 * 28 * 256 * 2 and cache.when == "sampling"
    here = expected_memory("model=qwen2.5-math-1.5b", "model.dtype=float32", "hardware.memory=64").memory
    copy, *_, cache = here.engine
    assert (copy.bytes, copy.when, cache.when) == (4 * 1_543_714_304, "always", "always") and here.host == ()
    states = 18 * 1_543_714_304 + 4 * 151936 * 1536
    assert [item.bytes for item in here.states[:3]] == [states, 2 * 1_543_714_304, 4 * 500_000_000]
    assert not expected_memory("algo=sft", "model=qwen2.5-math-1.5b", *EIGHT).memory.engine


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_layer_keeps_is_what_autograd_keeps(kind, dtype):
    """Bytes of the tensors saved for the backward pass, of two layers more, against the formula."""
    from transformers import AutoConfig

    def config(layers: int):
        own = {"head_dim": 32, "layer_types": ["full_attention"] * layers} if kind in ("qwen3", "gemma3_text") else {}
        return AutoConfig.for_model(
            kind, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320, vocab_size=64,
            num_hidden_layers=layers, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, **own,
        )  # fmt: skip

    tokens = 128
    for checkpointing in ("none", "selective", "full"):
        actual = (_saved(config(4), dtype, tokens, checkpointing) - _saved(config(2), dtype, tokens, checkpointing)) / 2
        one = ModelShape.of(config(2), dtype)
        by_mode = {"none": one.kept_per_token, "selective": one.products_per_token, "full": one.hidden * one.itemsize}
        expected = by_mode[checkpointing]
        assert actual / tokens == pytest.approx(expected, rel=0.02), (checkpointing, actual / tokens, expected)


def _saved(config, dtype: str, tokens: int, checkpointing: str) -> int:
    """Bytes of what autograd and selective checkpointing keep, which holds its tensors in Python."""
    from transformers import AutoModelForCausalLM

    from upge.train.activations import checkpoint_activations
    from upge.train.packed_policy import PackedPolicy
    from upge.train.packing import pack

    gc.collect()
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    checkpoint_activations(model, checkpointing)
    policy = PackedPolicy(model).train()
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    batch = pack([([1] * 8, [2] * (tokens - 7))])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = policy(batch, temperature=1.0, entropy=True)
    for thing in gc.get_objects():
        if type(thing).__name__ == "_VersionWrapper" and isinstance(thing.val, torch.Tensor):
            keep(thing.val)
    # What a graph keeps is freed by its backward pass only.
    sum(part.sum() for part in result).backward()
    return sum(size for size, _ in kept.values())


# A step.


def test_a_steps_traffic_by_hand():
    (actual,) = expected_memory("recipe=hpt-qwen2.5-math-7b").workloads.values()
    assert (actual.rollouts, actual.given, actual.trajectories) == (1024, 128, 1152)
    assert actual.longest == 9216 and actual.tokens == 1152 * 9216 and actual.updates == 2
    assert actual.tokens_per_update == 1152 * 9216 // 2 // 8 and actual.micro_batch == 9216
    assert actual.micro_batches == 72  # 72 rows per rank and update, of which one fits
    assert "sampled per rank: 128 responses" in str(actual)


def test_a_group_that_stays_together_and_a_small_batch_have_their_own_micro_batch():
    (actual,) = expected_memory("algo=dpo", "model=qwen2.5-math-1.5b", *EIGHT).workloads.values()
    assert (actual.rollouts, actual.given, actual.block) == (0, 64, 2) and actual.micro_batch == 64 * 192 // 8
    (actual,) = expected_memory("algo=dpo", "optimizer.micro_batch_tokens=10").workloads.values()
    assert actual.micro_batch == 2 * 192 and actual.micro_batches == 32
    (actual,) = expected_memory("prompts_per_step=2", "group_size=2").workloads.values()
    assert actual.micro_batch == actual.tokens_per_update == 6 * 192 < 16384
    (actual,) = expected_memory("optimizer.micro_batch_tokens=10").workloads.values()
    assert actual.micro_batch == 192 and actual.micro_batches == 32 * 9


# The balance.


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_has_a_balance(name):
    """Of each stage; none with preference pairs, guidance, or other models' predictions alone."""
    algorithm = algorithms.load(name)
    actual = balances(algorithm, 4, 16)
    needs = algorithm.needs
    has_none = needs.preference_pairs or needs.teacher or needs.prefixes or getattr(algorithm, "supports", None)
    assert len(actual) == (0 if has_none else len(getattr(algorithm, "stages", "1")))
    for one in actual.values():
        assert one.rollouts or one.demonstration
        assert (one.ratio is None) == ("alone" in str(one))

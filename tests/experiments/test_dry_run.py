"""`--dry-run`: what is printed is right, with nothing but a model's sizes, and what cannot fit is refused."""

from __future__ import annotations

import os

import pytest

from experiments.config import MODELS, compose, presets
from experiments.run import disk, dry_run
from experiments.run.dry_run import balances, plan
from experiments.run.memory_check import check_fits, outlook
from experiments.run.workload import GIB, planned
from upge.errors import ConfigError, DataError, ModelError, UserError
from upge.models.loading import read_config
from upge.train.config import HardwareConfig

EIGHT = ("hardware.gpus=8", "hardware.memory=79")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Neither a connection nor a cache, whatever this machine has."""

    def unreachable(name, subset, split):
        raise DataError(f"data.hub: '{name}' could not be loaded") from ConnectionError("no route to the hub")

    def local(path, overrides=None):
        if path in dry_run.KNOWN:
            raise ModelError(f"model.path={path}: neither a folder nor a model that can be found here")
        return read_config(path, overrides)

    monkeypatch.setattr("upge.data.table.read_hub", unreachable)
    monkeypatch.setattr(dry_run, "read_config", local)


def section(text: str, head: str) -> str:
    """The lines of one part of the output."""
    return text.split(f"{head}:\n")[1].split("\n\n")[0]


# Every recipe, with the models' configurations only.


@pytest.mark.parametrize("name", presets("recipe"))
def test_every_recipe_dry_runs_with_a_config_json_alone(name):
    composed = compose([f"recipe={name}"])
    text = plan(composed)
    path = composed.config.model.path
    assert f"'{path}' is not in the local cache and the hub cannot be reached" in text
    assert "has neither weights nor tokenizer" in text and "the data could not be checked here" in text
    assert "on 8 GPUs of 79.0 GiB" in section(text, "run") and "may run out of memory" not in text
    assert composed.algorithm.formula().splitlines()[-1].strip() in section(text, "formula")
    for actual in balances(composed.algorithm, composed.config.group_size, 4096).values():
        assert str(actual).splitlines()[0] in section(text, "gradient")
    shown = "chat, the tokenizer's own" if composed.config.model.template == "chat" else "Let's think step by step."
    assert shown in section(text, "prompt")
    assert "DeepSpeed's estimate" in text and "path: " + path in section(text, "configuration")


# What is printed.


def test_everything_is_there_for_a_model_that_is(tmp_path):
    text = plan(compose([f"output={tmp_path / 'run'}"]))
    assert "512 training problems, 512 with a demonstration; 256 evaluation problems" in section(text, "run")
    assert str(tmp_path / "run") in section(text, "run") and "without a GPU" in section(text, "run")
    assert "the tokenizer's chat template" in section(text, "prompt") and "example prompt" in section(text, "prompt")
    assert "rollouts : demonstration = 0.25 : 1 = 0.25" in section(text, "gradient")
    assert "100 steps of 32 prompts" in section(text, "each step")
    assert "notes:" not in text and not (tmp_path / "run").exists()


def test_split_settings_are_noted(tmp_path):
    text = plan(compose([f"output={tmp_path / 'run'}", "algo=hpt", "algo.terms.rl.gate.threshold=0.5"]))
    assert "note: algo.terms.rl.gate.threshold=0.5 no longer follows algo.terms.sft.gate" in section(text, "notes")


def test_stages_are_printed_one_by_one():
    text = plan(compose(["recipe=sft-then-grpo-qwen2.5-math-1.5b"]))
    assert "stage demonstrate: 1,055 steps of 128 prompts" in text and "stage reinforce: 500 steps" in text
    assert "stage reinforce: a step learns from rollouts alone" in section(text, "gradient")


def test_a_folder_with_a_configuration_alone_is_planned_with_its_template_as_it_stands():
    folder = MODELS / "llama-3.1-8b"
    own = ["model.template=Q: {prompt} A:", "model.opening=So", "model.dtype=bfloat16"]
    text = plan(compose([f"model={folder}", *own, *EIGHT]))
    assert f"'{folder}' has no tokenizer here" in text and "not in the local cache" not in text
    assert "model.template: 'Q: {prompt} A:'" in section(text, "prompt") and "model.opening: 'So'" in text


def test_data_that_cannot_be_reached_leave_an_example_in_the_models_own_words():
    text = plan(compose(["data=openr1-math-46k"]))
    assert "What is 2 + 3?" in section(text, "prompt")
    assert "the data could not be checked here" in section(text, "notes")


def test_the_start_of_a_run_is_checked_against_what_is_there(monkeypatch):
    assert check_fits(compose([])) == ()
    (note,) = check_fits(compose(["hardware.gpus=8"]))
    assert note.startswith("hardware.gpus: 8, but this run was started on 1 rank without a GPU")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 2**20}))
    with pytest.raises(ConfigError, match="model.path"):
        check_fits(compose([]))


def test_several_ranks_share_the_machines_memory(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    machine = planned(HardwareConfig(memory=10.0))
    assert (machine.ranks, machine.memory, machine.has_gpus) == (4, int(10 * GIB) // 4, False)
    assert "hardware.memory says" in str(machine) and "4 ranks without a GPU" in str(machine)


def test_too_little_main_memory_to_resume_is_a_note(monkeypatch):
    """On a machine with GPUs, where each rank reads its part of a checkpoint into main memory."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 2**30}))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**50}))
    model = ["model=qwen2.5-math-1.5b", f"model.path={MODELS / 'qwen2.5-math-1.5b'}", "hardware.memory=79"]
    composed = compose(model)
    (note,) = [n for n in outlook(composed, planned(composed.config.hardware)).notes if "main memory" in n]
    assert "has 1.0 GiB of main memory, and 17.3 GiB are needed" in note
    assert "reads its part of a checkpoint. The run may be killed; take more machines" in note
    composed = compose([*model, "deepspeed.offload=all"])
    (note,) = [n for n in outlook(composed, planned(composed.config.hardware)).notes if "main memory" in n]
    assert "what deepspeed.offload=all keeps" in note and "set deepspeed.offload=none, or take more machines" in note


def test_checkpointing_that_recomputes_less_is_proposed_where_it_fits():
    """With a tenth of the GPU to spare, and the mode that recomputes least."""

    def notes(*arguments: str) -> str:
        composed, _ = dry_run.with_known_models(compose(["hardware.gpus=8", "hardware.memory=79", *arguments]))
        return "\n".join(outlook(composed, planned(composed.config.hardware)).notes)

    large, full = "optimizer.micro_batch_tokens=32768", "model.gradient_checkpointing=full"
    small = notes("recipe=hpt-qwen2.5-math-1.5b", large, full)
    assert "model.gradient_checkpointing=selective is also estimated to fit, with 60.6 GiB" in small
    assert notes("recipe=hpt-qwen2.5-math-1.5b", large) == ""
    assert notes("recipe=hpt-qwen2.5-math-7b") == notes("recipe=hpt-qwen2.5-math-7b", large, full) == ""
    assert "gradient_checkpointing=selective is also estimated to fit" in notes("recipe=hpt-qwen2.5-math-7b", full)
    assert "gradient_checkpointing=none is" in notes("model=qwen2.5-0.5b", "optimizer.micro_batch_tokens=4096")
    assert "gradient_checkpointing" not in notes("model=qwen2.5-0.5b", "hardware.memory=6")


def test_a_refresh_that_does_not_fit_next_to_the_states_is_refused():
    """Sampling would fit with the share of the GPU that is given."""
    with pytest.raises(ConfigError, match="hardware.gpus: replacing the sampler's weights") as caught:
        plan(compose(["recipe=hpt-qwen2.5-math-7b", "hardware.memory=34.6", "rollout.memory_fraction=0.425"]))
    assert "35.1 GiB" in str(caught.value)


# What is refused.

REFUSALS = {
    "too large for the GPUs": (
        ["recipe=hpt-qwen2.5-math-7b", "hardware.gpus=1"],
        ["model.path", "7.62 B", "1 GPU of 79.0 GiB", "at least 2 of them", "hardware.gpus"],
    ),
    "too large for any number of them": (
        ["recipe=hpt-qwen2.5-math-7b", "hardware.memory=2"], ["model.path", "a larger machine"],
    ),
    "too large for a laptop": (
        ["recipe=hpt-qwen2.5-math-7b", "hardware.gpus=0", "hardware.memory=32"],
        ["model.path", "1 rank without a GPU", "hardware.gpus and hardware.memory"],
    ),
    "no memory stated": (["model=qwen2.5-math-7b", "hardware.gpus=8"], ["hardware.gpus", "hardware.memory"]),
    "beyond the positions": (
        ["recipe=hpt-qwen2.5-math-7b", "model.overrides.max_position_embeddings=4096"],
        ["rollout.max_prompt_tokens", "rollout.max_response_tokens", "9216", "4096"],
    ),
    "no room for one sequence": (
        ["recipe=hpt-qwen2.5-math-7b", "rollout.memory_fraction=0.18"],
        ["rollout.memory_fraction: 0.18", "the weights and the cache of one sequence", "14.7 GiB", "0.19 or more"],
    ),
    "no room beside the states": (
        ["recipe=hpt-qwen2.5-math-7b", "rollout.memory_fraction=0.9"],
        ["rollout.memory_fraction: 0.9", "AdamW take 19.9 GiB", "0.74 or less"],
    ),
    "no room for either": (
        ["recipe=hpt-qwen2.5-math-7b", "rollout.memory_fraction=0.4", "hardware.memory=30"],
        ["rollout.memory_fraction: 0.4", "take GPUs with more memory"],
    ),
    "ranks of an engine": (
        ["recipe=hpt-qwen2.5-math-7b", "rollout.tensor_parallel=8"],
        ["rollout.tensor_parallel=8", "28 attention heads", "possible: 1, 2, 4"],
    ),
    "ranks that engines do not divide": (
        ["recipe=hpt-qwen2.5-math-7b", "hardware.gpus=6", "rollout.tensor_parallel=4"],
        ["rollout.tensor_parallel=4", "the number of ranks, 6", "possible: 1, 2"],
    ),
    "an engine that cannot be divided": (
        ["model=tiny", "rollout.tensor_parallel=2"],
        ["rollout.tensor_parallel=2", "rollout.engine=vllm"],
    ),
    "micro-batch": (
        [
            *("recipe=hpt-qwen2.5-math-7b", "model.gradient_checkpointing=false"),
            "optimizer.micro_batch_tokens=32768",
        ],
        ["optimizer.micro_batch_tokens: 32,768", "model.gradient_checkpointing=selective or full"],
    ),
    "group too small": (["recipe=hpt-qwen2.5-math-7b", "group_size=1"], ["group_size: 1", "too small"]),
    "stage without steps": (["recipe=sft-then-grpo-qwen2.5-math-7b", "steps=1"], ["steps: 1", "algo.stages."]),
    "verifier": (["recipe=hpt-qwen2.5-math-7b", "verify.verifier=maths"], ["verify.verifier", "maths"]),
    "data that are not there": (["recipe=hpt-qwen2.5-math-7b", "data.path=nowhere.parquet"], ["nowhere.parquet"]),
    "unknown model": (["model=Somebody/Something"], ["model.path", "Somebody/Something"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_by_its_keys(case):
    arguments, fragments = REFUSALS[case]
    with pytest.raises(UserError) as caught:
        plan(compose(arguments))
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_what_is_refused_fits_after_the_fix_that_is_named():
    for fix in ("rollout.memory_fraction=0.19", "rollout.memory_fraction=0.74"):
        assert "each step:" in plan(compose(["recipe=hpt-qwen2.5-math-7b", fix]))
    # Two GPUs hold the states; whether the engine has a place beside them is said next.
    with pytest.raises(ConfigError, match="rollout.memory_fraction"):
        plan(compose(["recipe=hpt-qwen2.5-math-7b", "hardware.gpus=2"]))


def test_an_estimate_beyond_the_limit_that_is_no_lower_bound_is_a_note():
    text = plan(compose(["recipe=hpt-qwen2.5-math-7b", "hardware.memory=56", "rollout.memory_fraction=0.45"]))
    assert "training is estimated at 58.7 GiB per rank" in section(text, "notes")

"""Hints for unknown keys: names of TRL and verl, the last part of a key, and that every named key exists."""

from __future__ import annotations

import pytest

import algorithms
from experiments import hints
from experiments.config import GROUPS, compose, known_keys, presets
from upge.errors import ConfigError


def keys_of_algorithms() -> set[str]:
    """The keys below `algo.` of the algorithms that the hints name."""
    found = set()
    for name in ("grpo", "ppo", "dpo"):
        for where, _ in algorithms.leaves({"algo": compose([f"algo={name}"]).tree["algo"]}):
            found |= {".".join(map(str, where[:end])) for end in range(1, len(where) + 1)}
    return found


def test_every_key_that_a_hint_names_exists() -> None:
    data = {"data.path", "data.evaluation_path", "data.hub", "data.subset"}
    known = {*known_keys(), *GROUPS, *keys_of_algorithms(), *data}
    for name, (target, remark) in hints.NAMES.items():
        if target.startswith("correction."):
            _, correction, setting = target.split(".")
            assert setting in algorithms.read("grpo", [correction]).correction[correction], name
        else:
            assert target in known, f"{name}: {target}"
        for word in remark.replace(";", " ").replace(",", " ").replace(":", " ").split():
            if word.startswith("correction="):
                assert word.removeprefix("correction=") in presets("correction"), name
            if word.startswith("algo."):
                assert word in known, f"{name}: {word}"
    assert {"data.path", "data.hub"} <= {f"data.{key}" for key in compose(["algo=sft", "data=table"]).tree["data"]}
    assert not {*hints.NAMES, *hints.ABSENT} & {*known_keys(), *GROUPS} and not {*hints.NAMES} & {*hints.ABSENT}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lr=1e-5"], "lr: unknown key; did you mean 'optimizer.lr'?"),
        (["critic.learning_rate=1"], "critic.learning_rate: unknown key; did you mean 'critic.lr'?"),
        (["training.learning_rate=1"], "did you mean 'optimizer.lr'?"),
        (["num_generations=8"], "did you mean 'group_size'? (rollouts per prompt)"),
        (["per_device_train_batch_size=8"], "did you mean 'prompts_per_step'? (prompts per step over all ranks"),
        (["gradient_accumulation_steps=8"], "there is no such key by design: a step trains on prompts_per_step"),
        (["beta=0.1"], "did you mean 'correction.kl_k3.coefficient'? (together with correction=kl_k3"),
        (["max_completion_length=8"], "did you mean 'rollout.max_response_tokens'?"),
        (["max_prompt_length=8"], "did you mean 'rollout.max_prompt_tokens'?"),
        (["temperature=1"], "did you mean 'rollout.temperature'?"),
        (["algo=grpo", "epsilon_high=0.28"], "did you mean 'algo.terms.rl.estimator.mask.high'?"),
        (["algo=sft", "epsilon=0.2"], "in other algorithms this is algo.terms.rl.estimator.mask.low; the chosen one"),
        (["loss_type=dapo"], "did you mean 'algo'? (algo=grpo, dapo"),
        (["algo=grpo", "scale_rewards=false"], "did you mean 'algo.terms.rl.estimator.advantage.normalize_std'?"),
        (["max_length=64"], "did you mean 'rollout.max_response_tokens'? (also the limit of demonstrations"),
        (["train_dataset=x"], "did you mean 'data'? (a name; data=table"),
        (["vllm_importance_sampling_cap=2"], "did you mean 'correction.tis.cap'? (together with correction=tis)"),
        (["packing=true"], "there is no such key by design: sequences are always packed"),
        (["min_p=0.1"], "there is no such key by design: training rollouts are drawn from the whole"),
        (["output_dir=x"], "did you mean 'output'?"),
        (["max_steps=3"], "did you mean 'steps'?"),
        (["actor_rollout_ref.rollout.n=8"], "did you mean 'group_size'?"),
        (["actor_rollout_ref.actor.optim.lr=1"], "did you mean 'optimizer.lr'?"),
        (["algorithm.adv_estimator=grpo"], "did you mean 'algo'? (the algorithm decides it"),
        (["trainer.nnodes=2"], "there is no such key by design: start torchrun on each machine"),
        # The last part decides before the whole.
        (["warmup_steps=3"], "did you mean 'critic.warmup_steps' or 'optimizer.warmup_steps'?"),
        (["train.max_response_tokens=3"], "did you mean 'rollout.max_response_tokens'?"),
        (["max_respnse_tokens=3"], "did you mean 'rollout.max_response_tokens'?"),
        (["algo=grpo", "normalize_std=false"], "did you mean 'algo.terms.rl.estimator.advantage.normalize_std'?"),
        (["levels=[x]"], "did you mean 'data.levels'?"),
        (["stps=3"], "did you mean 'steps'?"),
        (["Steps=3"], "write steps=VALUE"),
        (["--steps=3"], "'--steps=3' is not of the form key=value; write steps=VALUE"),
        (["--learning_rate", "3"], "not of the form key=value; did you mean 'optimizer.lr'?"),
        (["--group-size=3"], "write group_size=VALUE"),
        (["--dry"], "see --help for the keys and flags"),
    ],
)
def test_the_hint_names_the_key(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(arguments)
    assert expected in str(refused.value)


def test_another_commands_keys_are_not_suggested() -> None:
    """`evaluate` has no optimizer, so TRL's name of its learning rate gets the nearest of the command's own keys."""
    assert hints.unknown("learning_rate", ["limit", "suite.temperature"]).startswith("known: ")
    assert hints.unknown("temperature", ["limit", "suite.temperature"]) == "did you mean 'suite.temperature'?"

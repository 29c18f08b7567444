"""TRL's GRPOTrainer as a child: the same prompts in the same order, the same rewards, AdamW and group size.

Its other settings: loss `grpo`, no KL, no gradient checkpointing, float32, no logging and no saving. With vLLM it uses
no importance correction, which would cost another forward pass.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.bench.trainers import Connection, StepControl, serve
from experiments.bench.trainers.ours import Job, RewardPool, WeightEvaluator
from experiments.cli import quiet
from upge.rollout.vllm_process import prepare_environment
from upge.train.prompt_order import prompt_indices
from upge.verify import Item


def train(job: dict[str, Any], connection: Connection) -> None:
    """Train until stopped.

    Args:
        job: `arguments` are the keys of one of our runs with algo=grpo, `checksum` is that of `ours`, `engine` a name
            of `_engine`, `batch` the rows of a micro-batch, `lr` another learning rate (0 = the run's).
        connection: the connection to the bench.
    """
    quiet()
    prepare_environment()
    loaded = Job.load(job["arguments"])
    with loaded.pool() as pool, tempfile.TemporaryDirectory() as folder:
        rewards, evaluator = RewardPool(pool, job["checksum"]), WeightEvaluator(loaded, pool)
        trainer = TimedTrainer(
            rewards,
            model=_model(loaded),
            args=_settings(loaded, job, folder),
            reward_funcs=_reward(loaded, rewards),
            train_dataset=_prompts(loaded),
            processing_class=loaded.prepared.prompting.tokenizer,
        )
        if job["engine"] == "vllm-patched":
            _fix_weight_sync(trainer)
        assert set(trainer.eos_token_ids) == set(loaded.prepared.prompting.stop_token_ids)
        control = StepControl(connection, lambda: evaluator(trainer.model.named_parameters()), trainer.compared)
        trainer.add_callback(_ControlCallback(control, trainer))
        trainer.train()


class TimedTrainer(GRPOTrainer):
    """Measures the time of its parts, and can replay given responses and compare a gradient without an update."""

    def __init__(self, rewards: RewardPool, **arguments: Any) -> None:
        self.reward_pool, self.comparison, self.step_metrics = rewards, None, {}
        self.compared_gradient: dict[str, Any] = {}
        super().__init__(**arguments)
        if self.use_vllm:
            self.vllm_generation.sync_weights = self._timed("refresh", self.vllm_generation.sync_weights)

    def _generate_single_turn(self, prompt_ids: list, *rest: Any, **named: Any) -> tuple:
        if self.comparison is not None:
            given = zip(self.comparison["prompts"], self.comparison["responses"], strict=True)
            repeated = [ids for ids, group in given for _ in group]
            assert [list(ids) for ids in prompt_ids] == repeated, "not the same prompts"
            completions = [list(ids) for group in self.comparison["responses"] for ids in group]
            self.step_metrics["tokens"] = sum(map(len, completions))
            return completions, None
        generated = self._timed("rollout", super()._generate_single_turn)(prompt_ids, *rest, **named)
        self.step_metrics["rollout"] -= self.step_metrics.setdefault("refresh", 0.0)
        self.step_metrics["tokens"] = sum(map(len, generated[0]))
        return generated

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        rewards = self._timed("verify", super()._calculate_rewards)(*arguments)
        self.step_metrics["reward"] = float(rewards.mean())
        groups = rewards.reshape(-1, self.num_generations)
        self.step_metrics["no_signal"] = float((groups == groups[:, :1]).all(dim=1).float().mean())
        return rewards

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.comparison is None:
            return super()._clip_grad_norm(model)
        expected = torch.load(self.comparison["gradient"], mmap=True)
        self.compared_gradient |= _difference(self.model, expected)
        # AdamW skips parameters without a gradient, so nothing changes and no step is counted.
        model.zero_grad(set_to_none=True)
        return torch.tensor(self.compared_gradient["norm"])

    @contextmanager
    def compared(self, command: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A context manager in which a step uses the responses of `command` and compares its gradient with the file."""
        self.comparison, self.compared_gradient = command, {}
        with self.reward_pool.by_checksum():
            yield self.compared_gradient
        self.comparison = None

    def _timed(self, name: str, function: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.step_metrics[name] = self.step_metrics.get(name, 0.0) + time.perf_counter() - began
            return result

        return timed


class _ControlCallback(TrainerCallback):
    """Reports finished steps, and waits for the next command."""

    def __init__(self, control: StepControl, trainer: TimedTrainer) -> None:
        self.step_control, self.trainer = control, trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.step_control.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        metrics, self.trainer.step_metrics = self.trainer.step_metrics, {}
        self.step_control.stepped(metrics)


def _settings(job: Job, chosen: Mapping[str, Any], folder: str) -> GRPOConfig:
    config = job.composed.config
    optimizer, rows = config.optimizer, config.prompts_per_step * config.group_size
    return GRPOConfig(
        output_dir=folder, max_steps=config.steps, seed=config.seed, use_cpu=True, shuffle_dataset=False,
        per_device_train_batch_size=chosen["batch"], gradient_accumulation_steps=rows // chosen["batch"],
        num_generations=config.group_size, max_completion_length=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature, loss_type="grpo", beta=0.0, gradient_checkpointing=False, bf16=False,
        learning_rate=chosen["lr"] or optimizer.lr, lr_scheduler_type="constant", weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1, adam_beta2=optimizer.beta2, max_grad_norm=optimizer.max_grad_norm,
        report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, **_engine(chosen["engine"], job),
    )  # fmt: skip


def _engine(name: str, job: Job) -> dict[str, Any]:
    """Settings of sampling: transformers' generate, its continuous batching, or vLLM in the same process, unchanged or
    with fixed weight sync."""
    config = job.composed.config.rollout
    if not name.startswith("vllm"):
        return {"use_transformers_continuous_batching": True} if name == "continuous" else {}
    return {
        **{"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False},
        "vllm_max_model_length": config.max_prompt_tokens + config.max_response_tokens,
        "generation_kwargs": {"stop_token_ids": list(job.prepared.prompting.stop_token_ids)},
    }


def _model(job: Job) -> nn.Module:
    config = job.composed.config.model
    model = AutoModelForCausalLM.from_pretrained(
        config.path, dtype=getattr(torch, config.dtype), trust_remote_code=False
    )
    # Only the stop tokens, so that the model's own defaults do not change the sampling.
    model.generation_config = GenerationConfig(eos_token_id=list(job.prepared.prompting.stop_token_ids))
    return model


def _prompts(job: Job) -> Dataset:
    """The prompts of all steps as texts, in the order in which our trainer takes them."""
    config, train, prompting = job.composed.config, job.prepared.train, job.prepared.prompting
    steps = (prompt_indices(s, config.prompts_per_step, len(train), config.seed) for s in range(config.steps))
    order = [index for step in steps for index in step]
    texts = [prompting.text(train[index].problem) for index in order]
    for index, ids in zip(order, prompting.tokenizer(texts)["input_ids"], strict=True):
        assert tuple(ids) == tuple(train[index].prompt_ids), "TRL tokenizes prompts as we do"
    return Dataset.from_dict({"prompt": texts, "example": order})


def _reward(job: Job, rewards: RewardPool) -> Callable[..., list[float]]:
    train, prompting = job.prepared.train, job.prepared.prompting

    def reward(completion_ids: list[list[int]], example: list[int], **_: Any) -> list[float]:
        problems = [train[index].problem for index in example]
        texts = prompting.decode(completion_ids)
        items = [Item(t, p.answer, p.prompt, p.verifier) for t, p in zip(texts, problems, strict=True)]
        return [future.result().reward for future in [rewards.submit(item) for item in items]]

    return reward


def _fix_weight_sync(trainer: TimedTrainer) -> None:
    """Load weights into vLLM on a CPU as our sampler does, because TRL's own load_weights fails there."""
    from upge.rollout.vllm_engine import _pack_heads_again

    generation = trainer.vllm_generation

    def sync() -> None:
        weights = ((name, tensor.clone()) for name, tensor in generation._iter_named_params())
        generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        generation.llm.apply_model(_pack_heads_again)
        generation.llm.reset_prefix_cache()

    generation.sync_weights = trainer._timed("refresh", sync)


def _difference(model: nn.Module, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of the model's gradient, and the relative norm of its difference from the expected one."""
    off, norm = 0.0, 0.0
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.double().reshape(-1)
        norm += float(gradient.square().sum())
        off += float((gradient - expected[name].double()).square().sum())
    return {"norm": norm**0.5, "difference": (off / norm) ** 0.5 if norm else float("inf")}


if __name__ == "__main__":
    serve(train)

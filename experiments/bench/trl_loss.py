"""The loss of TRL's GRPOTrainer: a real trainer object with its own model, and inputs in its format.

The settings are the fastest ones here: no gradient checkpointing, no KL term, and rollouts of the current policy, so
that no old log-probs are needed. TRL pads a generation batch to its longest prompt and response, shuffles it and splits
it into micro-batches with the same number of sequences. The head computes only the responses, chunk by chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upge.train.sample import Trajectory

STD_EPSILON = 1e-4
"""The constant that TRL adds to a group's standard deviation."""
TOKENIZER = Path(__file__).parents[1] / "models" / "tiny"
"""The trainer needs a tokenizer; the measured code never uses it."""


class TRLLoss:
    """Loss and backward as TRL's trainer runs them.

    Create it before calling `upge.train.distributed.connect`, because a trainer takes the environment of a process
    group as a sign of several processes. ZeRO-3 replaces `torch.nn.functional.linear` in the whole process; a call
    restores the original while it runs.

    Args:
        model: folder in Hugging Face format.
        size: responses of a group.
        batch: sequences of a micro-batch; it divides the number of rollouts.
        folder: where the trainer may write.
    """

    def __init__(self, model: str, size: int, batch: int, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self._linear, self._batch, self._size = F.linear, batch, size
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = GRPOConfig(
            output_dir=str(folder),
            loss_type="grpo",
            beta=0.0,
            epsilon=0.2,
            num_generations=size,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=size,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = GRPOTrainer(
                model=network,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=config,
                train_dataset=_prompts(),
                processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
            )
        self.model: nn.Module = self.trainer.model.train()

    def inputs(self, rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
        """The micro-batches of a generation batch."""
        device = next(self.model.parameters()).device
        prompts, prompt_mask = _padded([t.prompt_ids for t in rollouts], left=True)
        completions, completion_mask = _padded([t.response_ids for t in rollouts], left=False)
        columns = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": completions,
            "completion_mask": completion_mask,
            "advantages": advantages([t.reward for t in rollouts], self._size),
        }
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0))
        parts = order.split(self._batch)
        return [{name: column[rows].to(device) for name, column in columns.items()} for rows in parts]

    def __call__(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Runs forward, loss and backward of a generation batch; the gradient stays in the model."""
        replaced, F.linear = F.linear, self._linear
        try:
            self.model.zero_grad(set_to_none=True)
            self.trainer.current_gradient_accumulation_steps = len(micro_batches)
            for inputs in micro_batches:
                self.trainer._compute_loss(self.model, inputs).backward()
        finally:
            F.linear = replaced

    def gradient(self) -> list[Tensor]:
        """The flat gradients of all parameters."""
        return [parameter.grad.reshape(-1) for parameter in self.model.parameters()]


def advantages(rewards: Sequence[float], size: int) -> Tensor:
    """[B] advantages as GRPOTrainer computes them from rewards in the order of groups."""
    groups = torch.tensor(rewards).view(-1, size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + STD_EPSILON)).reshape(-1)


def _padded(sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    rows = [(width - len(ids), torch.tensor(ids)) for ids in sequences]
    sides = [(gap, 0) if left else (0, gap) for gap, _ in rows]
    ids = torch.stack([F.pad(row, side) for (_, row), side in zip(rows, sides, strict=True)])
    masks = torch.stack([F.pad(torch.ones_like(row), side) for (_, row), side in zip(rows, sides, strict=True)])
    return ids, masks


def _prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "1+1="}] * 8)

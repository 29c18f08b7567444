"""The libraries that benches compare with ("peers"), their separate environment, and the loss of TRL's trainer.

`make peers` installs them into .venv-peers, which also sees the packages of .venv (requirements/extra.sh). A bench with
`WITH_PEERS = True` runs in that environment if it exists, so that everything is measured in one process with the same
torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.cli import ROOT
from upge.train.sample import Trajectory

PEERS = {
    "TRL": ("trl", "trl.trainer.utils"),
    "Liger": ("liger-kernel", "liger_kernel.chunked_loss"),
    "cut-cross-entropy": ("cut-cross-entropy", "cut_cross_entropy"),
    "verl": ("verl", "verl/utils/experimental/torch_functional.py"),
}
"""Name → (distribution, measured module); a file is loaded by itself, without its package."""


def enter(environment: Path = ROOT / ".venv-peers") -> None:
    """Restart this program in the peers' environment, if that exists and the program does not run there yet.

    Call this at the start of a program, because it replaces the process.
    """
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), *sys.orig_argv[1:]])


@cache
def load(name: str) -> ModuleType:
    """Load the module of a peer.

    Raises:
        ImportError: the peer, or something that it needs, is not installed.
    """
    distribution, module = PEERS[name]
    return load_file(module, distribution) if module.endswith(".py") else importlib.import_module(module)


def load_file(module: str, distribution: str) -> ModuleType:
    """Load one file of an installed distribution, without its package.

    Raises:
        ImportError: there is no such file.
    """
    place = next((Path(p) / module for p in sys.path if (Path(p) / module).is_file()), None)
    if place is None:
        raise ImportError(f"{distribution} is not installed")
    spec = importlib.util.spec_from_file_location(f"peer_{place.stem}", place)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def missing() -> dict[str, str]:
    """The peers that cannot be loaded, with the reason."""
    reasons = {}
    for name in PEERS:
        try:
            load(name)
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def present(name: str) -> bool:
    """Whether a peer can be loaded."""
    return name not in missing()


def summary(names: Sequence[str] = tuple(PEERS)) -> str:
    """Sentences on the installed ones of some peers, with versions, and on the missing ones."""
    there = []
    for name in filter(present, names):
        try:
            there.append(f"{name} {version(PEERS[name][0])}")
        except PackageNotFoundError:
            there.append(f"{name} of unknown version")
    parts = [f"Peers: {', '.join(there)}."] if there else []
    absent = [name for name in names if not present(name)]
    if absent:
        parts.append(f"Not compared, because not installed: {', '.join(absent)}; `make peers` installs them.")
    return " ".join(parts)


class TRLLoss:
    """Loss and backward of TRL's GRPOTrainer: a real trainer object with its own model, and inputs in its format.

    The settings are the fastest ones here: no gradient checkpointing, no KL term, and rollouts of the current policy,
    so that no old log-probs are needed. TRL pads a generation batch to its longest prompt and response, shuffles it and
    splits it into micro-batches with the same number of sequences. The head computes only the responses, chunk by
    chunk.

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
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self._linear, self._batch, self._size = F.linear, batch, size
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
        config = GRPOConfig(
            output_dir=str(folder), loss_type="grpo", beta=0.0, epsilon=0.2, num_generations=size,
            per_device_train_batch_size=batch, gradient_accumulation_steps=size, gradient_checkpointing=False,
            bf16=False, use_cpu=not torch.cuda.is_available(), report_to=[],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = GRPOTrainer(
                model=network,
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                args=config,
                train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 8),
                # The trainer needs a tokenizer; the measured code never uses it.
                processing_class=AutoTokenizer.from_pretrained(ROOT / "experiments" / "models" / "tiny"),
            )
        self.model: nn.Module = self.trainer.model.train()

    def inputs(self, rollouts: Sequence[Trajectory]) -> list[dict[str, Any]]:
        """The micro-batches of a generation batch."""
        device = next(self.model.parameters()).device
        prompts, prompt_mask = padded([t.prompt_ids for t in rollouts], "left")
        completions, completion_mask = padded([t.response_ids for t in rollouts], "right")
        columns = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": completions,
            "completion_mask": completion_mask,
            "advantages": trl_advantages([t.reward for t in rollouts], self._size),
        }
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0))
        parts = order.split(self._batch)
        return [{name: column[rows].to(device) for name, column in columns.items()} for rows in parts]

    def __call__(self, micro_batches: Sequence[dict[str, Any]]) -> None:
        """Run forward, loss and backward of a generation batch; the gradient stays in the model."""
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


def trl_advantages(rewards: Sequence[float], size: int) -> Tensor:
    """[B] advantages as GRPOTrainer computes them from rewards in the order of groups: (R − mean)/(std + 1e-4)."""
    groups = torch.tensor(rewards).view(-1, size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).reshape(-1)


def padded(sequences: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Token ids [B, longest], padded with zeros on the left or right, and the mask of the real ones."""
    rows = [torch.tensor(ids) for ids in sequences]
    ids, mask = (
        pad_sequence(some, batch_first=True, padding_side=side) for some in (rows, [torch.ones_like(r) for r in rows])
    )
    return ids, mask

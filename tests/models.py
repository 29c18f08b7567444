"""Small random models and made-up trajectories for tests of the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from experiments.pretrain import build_model, build_tokenizer
from upge.prompt_memory import Remembered
from upge.train.sample import Trajectory, indexed


def save_random_model(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2 with two layers and tied embeddings, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, hidden=64, layers=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_odd_model(folder: Path, tied: bool, layers: int = 2) -> Path:
    """A random Qwen2 of odd width: two ranks cannot divide its parameters evenly, so their parts have padding.

    With `tied`, input and output embedding are one tensor.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=95,
        hidden_size=63,
        head_dim=32,
        intermediate_size=101,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def trajectories(
    groups: int = 5, group_size: int = 4, vocabulary: int = 90, seed: int = 0, pairs: bool = False
) -> list[Trajectory]:
    """Rollouts and a demonstration for each group; group 0 fails altogether, group 1 succeeds altogether. With `pairs`
    the demonstration is the chosen side of a pair, and a rejected one follows it. Something is remembered of each
    prompt."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=g))
        return tuple(torch.randint(3, vocabulary, (length,), generator=g).tolist())

    results = []
    for group in range(groups):
        prompt = tokens(3, 12)
        for member in range(group_size):
            response = tokens(1, 20)
            reward = float(group == 1 or (group > 1 and member % 2 == group % 2))
            sampled = (-torch.rand(len(response), generator=g) * 3 - 2).tolist()
            results.append(Trajectory(group, group, prompt, response, reward, False, tuple(sampled), True, "ok"))
        results.append(Trajectory(group, group, prompt, tokens(5, 25), 1.0, True, preference=int(pairs)))
        if pairs:
            results.append(Trajectory(group, group, prompt, tokens(3, 15), 0.0, True, preference=-1))
    remembered = [Remembered(0.1 + 0.2 * one.group, 8, 3, 0.5, 2) for one in results]
    return indexed(replace(one, remembered=known) for one, known in zip(results, remembered, strict=True))


def unrounded(model: torch.nn.Module) -> None:
    """Norms in the model's own precision, where those of transformers take theirs in float32 whatever the model's."""

    def forward(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.square().mean(-1, keepdim=True)
        if type(norm).__name__ == "Gemma3RMSNorm":
            return (1 + norm.weight) * hidden * torch.rsqrt(variance + norm.eps)
        return norm.weight * hidden * torch.rsqrt(variance + norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)

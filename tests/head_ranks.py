"""Worker of the ZeRO-3 test in test_logprobs.py: run by torchrun, writes its figures as JSON to the path it is given.

For a tied and an untied head, with and without activation checkpointing, it runs three updates of two micro-batches on
each rank and compares every parameter's gradient with that of the plain model: full logits, one sequence at a time.
"""

from __future__ import annotations

import json
import os
import random
import sys

import deepspeed
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from upge.train.micro_batches import Work, distribute
from upge.train.packed_policy import PackedPolicy
from upge.train.packing import pack, packed_length

VOCABULARY, UPDATES, MICRO_BATCHES = 67, 3, 2
ENTROPY_WEIGHT, TEMPERATURE = 0.3, 0.8


def make_model(tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return Qwen2ForCausalLM(config)


def make_trajectories(step: int) -> list[tuple[list[int], list[int]]]:
    """Five trajectories: few enough that with two ranks of two micro-batches each some share is empty."""
    rng = random.Random(step)
    sizes = [(rng.randint(1, 6), rng.randint(1, 12)) for _ in range(3 if step == 1 else 5)]
    return [tuple([rng.randrange(VOCABULARY) for _ in range(size)] for size in pair) for pair in sizes]


def plain_loss(model: Qwen2ForCausalLM, trajectories: list, coefficients: list[torch.Tensor]) -> torch.Tensor:
    loss = torch.zeros(())
    for (prompt, response), coefficient in zip(trajectories, coefficients, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logp = logits.log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        entropies = -(logp.exp() * logp).sum(-1)
        loss = loss + (coefficient * (chosen + ENTROPY_WEIGHT * entropies)).sum()
    return loss


def initialized(policy: PackedPolicy) -> deepspeed.DeepSpeedEngine:
    """Under ZeRO-3, which lets go of every parameter as soon as it can."""
    return deepspeed.initialize(
        model=policy,
        optimizer=torch.optim.AdamW(policy.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_force_ds_cpu_optimizer": False,
            # With the defaults ZeRO-3 would keep parameters this small gathered from the forward to the backward.
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
        },
    )[0]


def run_case(tied: bool, checkpointing: bool) -> dict[str, float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    policy = PackedPolicy(make_model(tied), chunk_size=7)
    if checkpointing:
        policy.model.gradient_checkpointing_enable()
    engine = initialized(policy)
    engine.train()
    head = policy.model.get_output_embeddings().weight
    figures = {"gradient_error": 0.0, "released_between": 1.0, "released_early": 1.0, "empty_micro_batches": 0.0}

    def watch(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        """Looks at the head's weight when the gradient leaves the head for the trunk."""

        def look(gradient: torch.Tensor) -> None:
            figures["released_early"] *= float(head.numel() == 0)

        output.register_hook(look)

    policy.model.model.norm.register_forward_hook(watch)
    for step in range(UPDATES):
        plain = make_model(tied)
        for theirs, ours in zip(plain.parameters(), policy.model.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([ours]):
                theirs.data.copy_(ours.data)
        trajectories = make_trajectories(step)
        coefficients = [torch.linspace(-1.0, 2.0, len(response)) for _, response in trajectories]
        lengths = [packed_length(*trajectory) for trajectory in trajectories]
        # Every rank must run MICRO_BATCHES of them; this worker fills up with empty ones where the plan has fewer.
        budget = max(sum(lengths) // (ranks * MICRO_BATCHES) + max(lengths), 1)
        plan = distribute([Work(tokens) for tokens in lengths], ranks, budget)[rank]
        assert len(plan) <= MICRO_BATCHES
        for members in plan + [[]] * (MICRO_BATCHES - len(plan)):
            batch = pack([trajectories[i] for i in members])
            logprobs, entropies = engine(batch, temperature=TEMPERATURE, entropy=True)
            weights = torch.zeros(batch.shape)
            for row, index in enumerate(members):
                weights[row, : len(coefficients[index])] = coefficients[index]
            figures["released_between"] *= float(head.numel() == 0)
            figures["empty_micro_batches"] += float(not members)
            engine.backward((batch.unpad(weights) * (logprobs + ENTROPY_WEIGHT * entropies)).sum())
            engine_gradients = None
            if engine.is_gradient_accumulation_boundary():
                engine_gradients = [deepspeed.utils.safe_get_full_grad(p) for p in policy.model.parameters()]
            engine.step()
        plain_loss(plain, trajectories, coefficients).backward()
        error = largest_error(plain, engine_gradients, ranks * MICRO_BATCHES)
        figures["gradient_error"] = max(figures["gradient_error"], error)
    engine.destroy()
    return figures


def largest_error(plain: torch.nn.Module, gradients: list[torch.Tensor], parts: int) -> float:
    """Of the gradients against those of `plain` over `parts`, relative to a parameter's gradient."""
    errors = []
    for parameter, ours in zip(plain.parameters(), gradients, strict=True):
        expected = parameter.grad / parts
        errors.append(((ours - expected).norm() / expected.norm().clamp_min(1e-3)).item())
    return max(errors)


def main(path: str) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    results = {
        f"{'tied' if tied else 'untied'}{' checkpointed' if checkpointing else ''}": run_case(tied, checkpointing)
        for tied in (True, False)
        for checkpointing in (False, True)
    }
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(gathered, file)
    dist.barrier()


if __name__ == "__main__":
    code = 1
    try:
        main(sys.argv[1])
        code = 0
    finally:
        # An orderly end of the interpreter aborts now and then, after all work is done; leave before it can.
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 0:
            os._exit(0)

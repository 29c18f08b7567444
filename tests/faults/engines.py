"""`python -m tests.faults.engines NAME OUTPUT`: an engine of `tiny` gets ruined weights, and then good ones again.

OUTPUT gets, as JSON, the rollouts before and after each fault and the errors in between.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from upge import rollout
from upge.errors import Interrupted, RunError
from upge.rollout import Sampling
from upge.rollout.base import Sampler

ROOT = Path(__file__).parents[2]
PROMPTS, SAMPLING = [[5, 7, 9, 11], [4, 3]], Sampling(max_tokens=24)


def sampled(sampler: Sampler, **more: Any) -> list:
    groups = sampler.sample(PROMPTS, 4, SAMPLING, [1, 2], **more)
    return [[(list(one.token_ids), list(one.logprobs)) for one in group] for group in groups]


def attempted(sampler: Sampler, **more: Any) -> str:
    """The name of the error, and its first line."""
    try:
        sampled(sampler, **more)
    except (RunError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "none"


def main(name: str, output: str) -> None:
    """Plants the faults one after the other."""
    folder = ROOT / "experiments" / "models" / "tiny"
    weights = load_file(folder / "model.safetensors")
    sampler = rollout.load(name, folder, max_length=64, device="cpu", seed=0)

    def times(factor: float) -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, weight * factor) for key, weight in weights.items())

    results: dict[str, Any] = {"before": sampled(sampler)}
    for kind, factor in (("nan", math.nan), ("huge", 1e30)):
        sampler.load_weights(times(factor))
        results[kind] = attempted(sampler)
        results[f"refused after {kind}"] = attempted(sampler)
        sampler.load_weights(times(1.0))
        results[f"after {kind}"] = sampled(sampler)
    results["interrupted"] = attempted(sampler, interrupted=lambda: True)
    results["after interrupted"] = sampled(sampler)
    if name == "vllm":

        def fails() -> Any:
            raise ValueError("the engine has died\nand more lines")

        engine: Any = sampler
        engine._llm.llm_engine.step = fails
        results["failed"] = attempted(sampler)
        sampler.load_weights(times(1.0))
        results["after failed"] = sampled(sampler)
    assert Interrupted.__name__ in results["interrupted"]
    sampler.close()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Algorithms beyond those in algorithms/, composed of the core's parts: combinations that no file has.

Name → YAML. Each has its textbook objective in textbook.py; test_gradients.py compares the two. The files of
algorithms/ are compared in test_parity.py.
"""

from __future__ import annotations

from omegaconf import OmegaConf

import algorithms
from upge import Algorithm, Pipeline


def term(
    source="rollouts",
    gate="ConstantGate",
    mask="NoMask",
    denominator="BehaviorPolicy",
    advantage="GroupRelative",
    likelihood="PolicyLikelihood",
    reduction="TokenMean",
    coefficient=1.0,
) -> dict:
    """A term from class names, or (class name, settings) pairs."""

    def node(described: str | tuple[str, dict]) -> dict:
        name, settings = (described, {}) if isinstance(described, str) else described
        return {"_target_": f"upge.{name}", **settings}

    estimator = {"mask": mask, "denominator": denominator, "advantage": advantage, "likelihood": likelihood}
    return {
        "source": source,
        "gate": node(gate),
        "estimator": {slot: node(part) for slot, part in estimator.items()},
        "reduction": node(reduction),
        "coefficient": coefficient,
    }


PLAIN = ("GroupRelative", {"normalize_std": False})
QUESTION = ("QuestionMean", {"over": "term"})


def part(name: str, **settings) -> dict:
    return {"_target_": f"upge.{name}", **settings}


def _regularised(kind: str) -> dict:
    reduction = part("TokenMean")
    return {
        "terms": {"rl": term(mask="PPOClip", reduction=QUESTION)},
        "regularizers": {
            "kl": part("KLPenalty", kind=kind, coefficient=0.02, reduction=reduction),
            "entropy": part("EntropyBonus", coefficient=0.01, reduction=reduction),
        },
    }


CONFIGS: dict[str, dict] = {
    "gae_ppo": {"terms": {"rl": term(mask="PPOClip", advantage=("GAE", {"discount": 0.9, "lam": 0.8}))}},
    "corrected_ppo": {
        "terms": {
            "rl": term(
                mask="PPOClip",
                advantage=PLAIN,
                denominator=("SamplerCorrected", {"denominator": part("BehaviorPolicy"), "cap": 1.1}),
            )
        }
    },
    "banded": {
        "terms": {
            "rl": term(
                mask=("AllOf", {"masks": [part("NoMask"), part("ImportanceBand", low=0.8, high=1.25, of="sampler")]}),
                advantage=PLAIN,
                denominator=("SamplerCorrected", {"denominator": part("BehaviorPolicy"), "cap": None}),
            )
        }
    },
    "dual_clip": {"terms": {"rl": term(mask=("PPOClip", {"dual": 1.3}), advantage=PLAIN)}},
    "kl_shaped": {
        "terms": {
            "rl": term(
                advantage=("KLShaped", {"coefficient": 0.05, "advantage": part("GroupRelative", normalize_std=False)})
            )
        }
    },
    "chord": {
        "terms": {
            "rl": term(
                gate=("Complement", {"gate": part("Schedule", warmup=4, decay=20, peak=0.9, end=0.05)}),
                mask="PPOClip",
                reduction=QUESTION,
            ),
            "sft": term(
                "demonstrations",
                ("Schedule", {"warmup": 4, "decay": 20, "peak": 0.9, "end": 0.05}),
                denominator="CurrentPolicy",
                advantage="ConstantAdvantage",
            ),
        }
    },
    "regularised_k1": _regularised("k1"),
    "regularised_k2": _regularised("k2"),
    "regularised_k3": _regularised("k3"),
}


def load(name: str) -> Algorithm:
    """A composition of this file, or an algorithm of algorithms/."""
    if name in CONFIGS:
        return algorithms.compose(OmegaConf.create(CONFIGS[name]), name)
    return algorithms.load(name)


def stages(results: Algorithm | Pipeline) -> dict[str, Algorithm]:
    """Stage → algorithm; a single algorithm is the one stage of its name."""
    return {name: stage.algorithm for name, stage in Pipeline.of(results).stages.items()}


def by_stage() -> dict[str, Algorithm]:
    """Every file of algorithms/, pipelines stage by stage: 'name: stage' → algorithm."""
    results = {name: stages(algorithms.load(name)) for name in algorithms.names()}
    return {f"{name}: {stage}" if len(own) > 1 else name: own[stage] for name, own in results.items() for stage in own}


#: Everything with terms of its own: not what runs several algorithms in stages.
ALL = [*(name for name in algorithms.names() if "stages" not in algorithms.read(name)), *CONFIGS]

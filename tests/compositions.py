"""Algorithms beyond those in algorithms/, composed of the core's parts: proof that it carries them unchanged.

Name → YAML. Each has its textbook objective in textbook.py; test_gradients.py compares the two.
"""

from __future__ import annotations

from omegaconf import OmegaConf

import algorithms
from upge import Algorithm


def term(
    source="rollouts",
    gate="Always",
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
UNION = ("GroupRelative", {"baseline": "group"})
QUESTION = ("QuestionMean", {"over": "term"})
SHARED = ("FixedLength", {"length": 1024, "over": "batch"})


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
    "rloo": {
        "terms": {
            "rl": term(
                denominator="CurrentPolicy", advantage="LeaveOneOut", reduction=("SequenceMean", {"tokens": "sum"})
            )
        }
    },
    "gspo": {
        "terms": {
            "rl": term(
                mask=("SequenceClip", {"low": 0.05, "high": 0.05}),
                denominator="SequenceBehaviorPolicy",
                reduction=QUESTION,
            )
        }
    },
    "cispo": {"terms": {"rl": term(denominator=("ClippedBehaviorPolicy", {"high": 1.2}))}},
    "luffy": {
        "terms": {
            "on": term(advantage=UNION, reduction=SHARED),
            "off": term(
                "demonstrations",
                denominator="UnitDenominator",
                advantage=UNION,
                likelihood="ShapedLikelihood",
                reduction=SHARED,
            ),
        }
    },
    "srft": {
        "terms": {
            "sft": term(
                "demonstrations",
                ("EntropyWeight", {"scale": 0.5, "sign": -1}),
                denominator="CurrentPolicy",
                advantage="ConstantAdvantage",
                reduction="SequenceMean",
            ),
            "offline": term("demonstrations", denominator="UnitDenominator", advantage=UNION, reduction="SequenceMean"),
            "positive": term(
                "rollouts",
                ("EntropyWeight", {"scale": 0.1, "sign": 1}),
                denominator="CurrentPolicy",
                advantage=("SignedReward", {"failure": 0.0}),
                reduction="SequenceMean",
            ),
            "negative": term(
                denominator="CurrentPolicy", advantage=("SignedReward", {"success": 0.0}), reduction="SequenceMean"
            ),
        }
    },
    "dpo": {
        "terms": {
            "pairs": term(
                "preference_pairs",
                denominator="CurrentPolicy",
                advantage="PairwisePreference",
                reduction=("SequenceMean", {"tokens": "sum"}),
            )
        }
    },
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
                gate=("Schedule", {"warmup": 4, "decay": 20, "peak": 0.9, "end": 0.05, "complement": True}),
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


ALL = [*algorithms.names(), *CONFIGS]

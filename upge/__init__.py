"""upge: post-training of language models as one gradient made of four interchangeable parts.

    grad = Σ_trajectories Σ_tokens  w · 1_stable · (1/π_ref) · Â · ∇π_θ

`import upge` loads only torch and jaxtyping. Engines, trainers and verifiers are imported where they are used.
"""

import importlib
from typing import Any

from upge import components as _components
from upge.algorithm import Algorithm, InterleavedUpdate
from upge.components import *  # noqa: F403
from upge.errors import ConfigError, DataError, ModelError, UserError
from upge.estimate import Estimate
from upge.estimator import Factors, TermFactors, UnifiedGradient
from upge.gates import (
    Complement,
    ConstantGate,
    EntropyWeight,
    Finished,
    Gate,
    PassRateAbove,
    PassRateAtMost,
    PassRateBetween,
    PassRateTable,
    ProductOf,
    Replayed,
    Schedule,
    SiblingSucceeded,
)
from upge.guidance import BinomialPrefix, Guidance, PrefixLength, UniformPrefix
from upge.needs import Needs
from upge.pipeline import Pipeline, Stage
from upge.prompt_memory import DecayedMean, DriftDecay, PromptColumns, PromptMemory, PromptRecord
from upge.prompt_sampling import (
    Age,
    Curriculum,
    DynamicSampling,
    NearPassRate,
    ProductOfWeights,
    PromptWeight,
    Uncertainty,
)
from upge.reduction import FixedLength, QuestionMean, Reduction, SequenceMean, TokenMean
from upge.regularizers import DivergencePenalty, EntropyBonus, KLPenalty, Regularizer, ValueLoss
from upge.replay import Replay
from upge.stateful import MetaGradient, NoiseBalanced, StatefulGate
from upge.support import FullVocabulary, SampledToken, Support, TopK
from upge.term import Term
from upge.trajectories import Trajectories
from upge.views import Distributions, PackedTokens

__version__ = "0.2.0.dev0"
__all__ = [
    *_components.__all__,
    "Age",
    "Algorithm",
    "BinomialPrefix",
    "ConstantGate",
    "Complement",
    "ConfigError",
    "Curriculum",
    "DataError",
    "DecayedMean",
    "Distributions",
    "DivergencePenalty",
    "DriftDecay",
    "DynamicSampling",
    "EntropyBonus",
    "EntropyWeight",
    "Estimate",
    "Factors",
    "Finished",
    "FixedLength",
    "FullVocabulary",
    "Gate",
    "Guidance",
    "InterleavedUpdate",
    "KLPenalty",
    "MetaGradient",
    "NoiseBalanced",
    "ModelError",
    "NearPassRate",
    "Needs",
    "PackedTokens",
    "PassRateAbove",
    "PassRateAtMost",
    "PassRateBetween",
    "PassRateTable",
    "Pipeline",
    "PrefixLength",
    "ProductOf",
    "ProductOfWeights",
    "PromptColumns",
    "PromptMemory",
    "PromptRecord",
    "PromptWeight",
    "QuestionMean",
    "Reduction",
    "Regularizer",
    "Replay",
    "Replayed",
    "SampledToken",
    "Schedule",
    "SequenceMean",
    "SiblingSucceeded",
    "Stage",
    "StatefulGate",
    "Support",
    "Term",
    "TermFactors",
    "TokenMean",
    "TopK",
    "Trajectories",
    "Uncertainty",
    "UnifiedGradient",
    "UniformPrefix",
    "UserError",
    "ValueLoss",
    "__version__",
]

_PACKAGES = ("corrections", "data", "instantiate", "logprobs", "rollout", "testing", "theory", "train", "verify")


def __getattr__(name: str) -> Any:
    """Load submodules such as `upge.verify` on first use, so that `import upge` is enough."""
    if name in _PACKAGES:
        return importlib.import_module(f"upge.{name}")
    raise AttributeError(f"module 'upge' has no attribute '{name}'")

"""The four slots of the unified gradient and what fills them; a file per slot."""

from upge.components.advantage import (
    GAE,
    ConstantAdvantage,
    GroupRelative,
    KLShaped,
    LeaveOneOut,
    PairwisePreference,
    SignedReward,
)
from upge.components.base import (
    AdvantageEstimator,
    Component,
    Formula,
    LikelihoodGradient,
    ReferenceDenominator,
    StabilizationMask,
)
from upge.components.denominator import (
    BehaviorPolicy,
    ClippedBehaviorPolicy,
    CurrentPolicy,
    SamplerCorrected,
    SequenceBehaviorPolicy,
    UnitDenominator,
)
from upge.components.likelihood import PolicyLikelihood, ShapedLikelihood
from upge.components.mask import AllOf, ImportanceBand, NoMask, PPOClip, SequenceClip

__all__ = [
    "GAE",
    "AdvantageEstimator",
    "AllOf",
    "BehaviorPolicy",
    "ClippedBehaviorPolicy",
    "Component",
    "ConstantAdvantage",
    "CurrentPolicy",
    "Formula",
    "GroupRelative",
    "ImportanceBand",
    "KLShaped",
    "LeaveOneOut",
    "LikelihoodGradient",
    "NoMask",
    "PPOClip",
    "PairwisePreference",
    "PolicyLikelihood",
    "ReferenceDenominator",
    "SamplerCorrected",
    "SequenceBehaviorPolicy",
    "SequenceClip",
    "ShapedLikelihood",
    "SignedReward",
    "StabilizationMask",
    "UnitDenominator",
]

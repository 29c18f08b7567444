"""The four slots of the unified gradient and what fills them; a file per slot."""

from upge.components.advantage import (
    ConstantAdvantage,
    GroupRelative,
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
    TokenReward,
)
from upge.components.correction import OverlongShaped, SamplerCorrected, SequenceSamplerBand
from upge.components.denominator import (
    BehaviorPolicy,
    ClippedBehaviorPolicy,
    ClippedFrozenPolicy,
    CurrentPolicy,
    GeometricMeanBehaviorPolicy,
    SequenceBehaviorPolicy,
    SequenceFrozenPolicy,
    UnitDenominator,
)
from upge.components.likelihood import PolicyLikelihood, PowerLikelihood, ShapedLikelihood
from upge.components.mask import (
    AllOf,
    ImportanceBand,
    LogRatioClip,
    NoMask,
    PPOClip,
    SequenceClip,
    SigmoidGate,
)
from upge.components.mixture import MixedBehaviorPolicy
from upge.components.returns import GAE, ReturnToGo
from upge.components.reward import KLPenalizedReward, OutcomeReward
from upge.components.shaping import KLShaped, Shifted, Tempered, Whitened

__all__ = [
    "GAE",
    "AdvantageEstimator",
    "AllOf",
    "BehaviorPolicy",
    "ClippedBehaviorPolicy",
    "ClippedFrozenPolicy",
    "Component",
    "ConstantAdvantage",
    "CurrentPolicy",
    "Formula",
    "GeometricMeanBehaviorPolicy",
    "GroupRelative",
    "ImportanceBand",
    "KLPenalizedReward",
    "KLShaped",
    "LeaveOneOut",
    "LikelihoodGradient",
    "LogRatioClip",
    "MixedBehaviorPolicy",
    "NoMask",
    "OutcomeReward",
    "OverlongShaped",
    "PPOClip",
    "PairwisePreference",
    "PolicyLikelihood",
    "PowerLikelihood",
    "ReferenceDenominator",
    "ReturnToGo",
    "SamplerCorrected",
    "SequenceBehaviorPolicy",
    "SequenceClip",
    "SequenceFrozenPolicy",
    "SequenceSamplerBand",
    "ShapedLikelihood",
    "Shifted",
    "SigmoidGate",
    "SignedReward",
    "StabilizationMask",
    "Tempered",
    "TokenReward",
    "UnitDenominator",
    "Whitened",
]

"""The four slots of the unified gradient and the parts that fill them, with one file per slot."""

from upge.components.advantage import ConstantAdvantage, GroupRelative, LeaveOneOut, PairwisePreference, SignedReward
from upge.components.base import (
    AdvantageEstimator,
    Component,
    LikelihoodGradient,
    ReferenceDenominator,
    StabilizationMask,
    TokenReward,
)
from upge.components.denominator import (
    BehaviorPolicy,
    ClippedBehaviorPolicy,
    ClippedReferencePolicy,
    CurrentPolicy,
    GeometricMeanBehaviorPolicy,
    MixedBehaviorPolicy,
    SamplerCorrected,
    SequenceBehaviorPolicy,
    SequenceReferencePolicy,
    UnitDenominator,
)
from upge.components.distillation import JensenShannon, LogRatio, Surprisal, TargetProbability, TiltedReference
from upge.components.likelihood import PolicyLikelihood, PowerLikelihood, ShapedLikelihood
from upge.components.mask import (
    AllOf,
    ImportanceBand,
    LogRatioClip,
    NoMask,
    PPOClip,
    SequenceClip,
    SequenceSamplerBand,
    SigmoidGate,
)
from upge.components.returns import GAE, KLPenalizedReward, OutcomeReward, ReturnToGo
from upge.components.shaping import KLShaped, OverlongShaped, PrefixWeighted, Shifted, Tempered, Whitened
from upge.formula import Formula

__all__ = [
    "GAE",
    "AdvantageEstimator",
    "AllOf",
    "BehaviorPolicy",
    "ClippedBehaviorPolicy",
    "ClippedReferencePolicy",
    "Component",
    "ConstantAdvantage",
    "CurrentPolicy",
    "Formula",
    "GeometricMeanBehaviorPolicy",
    "GroupRelative",
    "ImportanceBand",
    "KLPenalizedReward",
    "KLShaped",
    "JensenShannon",
    "LeaveOneOut",
    "LikelihoodGradient",
    "LogRatio",
    "LogRatioClip",
    "MixedBehaviorPolicy",
    "NoMask",
    "OutcomeReward",
    "OverlongShaped",
    "PPOClip",
    "PairwisePreference",
    "PolicyLikelihood",
    "PowerLikelihood",
    "PrefixWeighted",
    "ReferenceDenominator",
    "ReturnToGo",
    "SamplerCorrected",
    "SequenceBehaviorPolicy",
    "SequenceClip",
    "SequenceReferencePolicy",
    "SequenceSamplerBand",
    "ShapedLikelihood",
    "Shifted",
    "SigmoidGate",
    "SignedReward",
    "StabilizationMask",
    "Surprisal",
    "TargetProbability",
    "Tempered",
    "TiltedReference",
    "TokenReward",
    "UnitDenominator",
    "Whitened",
]

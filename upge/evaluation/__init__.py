"""What a policy can do, measured: the samples of benchmarks, accuracy, pass@k, and how sure either is."""

from __future__ import annotations

from upge.evaluation.intervals import Difference, Interval, Paired, holm, intervals, paired
from upge.evaluation.passk import pass_at_k
from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.scores import Figures, Outcomes, figures, suite_scores

__all__ = [
    "Difference",
    "Figures",
    "Interval",
    "Outcomes",
    "Paired",
    "Sample",
    "SampleFile",
    "figures",
    "holm",
    "intervals",
    "paired",
    "pass_at_k",
    "suite_scores",
]

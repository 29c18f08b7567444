"""Evaluation of a policy on benchmarks: samples, accuracy, pass@k, and confidence intervals of both."""

from __future__ import annotations

from upge.evaluation.intervals import Difference, Interval, Paired, holm, intervals, paired
from upge.evaluation.samples import Sample, SampleFile
from upge.evaluation.scores import BenchmarkScores, Outcomes, benchmark_scores, pass_at_k, suite_scores

__all__ = [
    "BenchmarkScores",
    "Difference",
    "Interval",
    "Outcomes",
    "Paired",
    "Sample",
    "SampleFile",
    "benchmark_scores",
    "holm",
    "intervals",
    "paired",
    "pass_at_k",
    "suite_scores",
]

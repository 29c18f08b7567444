"""Bias and variance of gradient estimators on a real policy, from sketched gradients of single trajectories.

    scores = ModelScores(model, width=8192)               # computes gradients of single trajectories
    directions = Directions()
    estimators = [estimator(a, pool, columns, directions) for a in algorithms]
    rows = gradients(scores, directions.requests)         # computes every distinct gradient once
    metrics(batch_sample(pool, estimators[0].contributions(pool, rows)), target)

`python -m experiments.diagnose` runs all of these steps; docs/diagnose.md explains the metrics.
"""

from upge.measure.by_rate import bins_of
from upge.measure.contributions import (
    PENALTIES,
    Directions,
    Entries,
    Estimator,
    Slopes,
    estimator,
    gradients,
    slopes,
    true_gradient,
)
from upge.measure.diagnosis import Measured, Targets, batch_estimates, batch_sample, conflict, imitation, measured, same
from upge.measure.metrics import Estimated, Metrics, Sample, cosine_of, cosine_with, exact_metrics, metrics
from upge.measure.pool import Group, Pool, batches, deal
from upge.measure.scores import ModelScores, Request, Scores, Sketch

__all__ = [
    "PENALTIES",
    "Directions",
    "Entries",
    "Estimated",
    "Estimator",
    "Group",
    "Measured",
    "Metrics",
    "ModelScores",
    "Pool",
    "Request",
    "Sample",
    "Scores",
    "Sketch",
    "Slopes",
    "Targets",
    "batch_estimates",
    "batch_sample",
    "batches",
    "bins_of",
    "conflict",
    "cosine_of",
    "cosine_with",
    "deal",
    "estimator",
    "exact_metrics",
    "gradients",
    "imitation",
    "measured",
    "metrics",
    "same",
    "slopes",
    "true_gradient",
]

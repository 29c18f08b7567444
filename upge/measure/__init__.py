"""Bias and variance of gradient estimators on a real policy: sketched gradients of trajectories, unbiased figures.

    scores = ModelScores(model, width=8192)               # gradients of single trajectories
    directions = Directions()
    found = [estimator(a, pool, columns, directions) for a in algorithms]
    rows = gradients(scores, directions.requests)         # each gradient once, whoever asks for it
    figures(batch_sample(pool, found[0].contributions(pool, rows)), target)

`python -m experiments.diagnose` does all of it; docs/diagnose.md says what the figures mean.
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
from upge.measure.diagnosis import (
    Measured,
    Targets,
    batch_estimates,
    batch_sample,
    conflict,
    imitation,
    measured,
    same,
)
from upge.measure.figures import Figures, Sample, cosine_of, cosine_with, exact_figures, figures
from upge.measure.pool import Group, Pool, batches, deal
from upge.measure.scores import ModelScores, Request, Scores, Sketch
from upge.measure.statistics import Estimated

__all__ = [
    "PENALTIES",
    "Directions",
    "Entries",
    "Estimated",
    "Estimator",
    "Figures",
    "Group",
    "Measured",
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
    "exact_figures",
    "figures",
    "gradients",
    "imitation",
    "measured",
    "same",
    "slopes",
    "true_gradient",
]

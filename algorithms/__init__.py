"""The algorithms, a YAML file each: a file says everything that differs from another's, and nothing else.

    load("grpo", ["terms.rl.estimator.mask.high=0.28"], corrections=["tis"])

reads the file, puts the algorithms that it names in their place, applies corrections, then overrides, and builds.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from algorithms.building import compose
from algorithms.correcting import apply
from algorithms.files import CORRECTIONS, FOLDER, check_names, content, corrections, find, header, inline, names, stem
from algorithms.overriding import override
from upge.algorithm import Algorithm
from upge.pipeline import Pipeline


def read(name: str, corrections: Sequence[str] = ()) -> DictConfig:
    """The configuration of an algorithm, by name or by the path of a YAML file, with corrections by name or path.

    Raises:
        ConfigError: no such algorithm, correction or file, not YAML, or a correction that has nothing to apply to.
    """
    file = find(name)
    tree = content(file)
    inline(tree, "algo", (file.resolve(),), file.parent)
    check_names(tree, "algo")
    return OmegaConf.create(apply(tree, corrections, stem(name)))


def load(name: str, overrides: Sequence[str] = (), corrections: Sequence[str] = ()) -> Algorithm | Pipeline:
    """The algorithm `name` (or the path of a YAML file) with corrections, then dot-list overrides.

    >>> load("grpo", ["terms.rl.estimator.mask.high=0.28"]).terms["rl"].estimator.mask.high
    0.28
    """
    return compose(override(read(name, corrections), overrides), stem(name))


__all__ = [
    "CORRECTIONS",
    "FOLDER",
    "compose",
    "corrections",
    "find",
    "header",
    "load",
    "names",
    "override",
    "read",
    "stem",
]

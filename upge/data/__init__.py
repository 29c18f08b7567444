"""Data sets of problems with verifiable answers, and their conversion to token ids."""

from __future__ import annotations

from upge.data.arithmetic import Arithmetic
from upge.data.encode import Encoded, Example, encode
from upge.data.gsm8k import GSM8K
from upge.data.prompting import Prompting
from upge.data.reasoning_gym import ReasoningGym
from upge.data.splits import DataSet, Mixture, Problem, Rows, Splits, limit_demonstrated, limit_levels
from upge.data.table import Table

__all__ = [
    "GSM8K",
    "Arithmetic",
    "DataSet",
    "Encoded",
    "Example",
    "Mixture",
    "Problem",
    "Prompting",
    "ReasoningGym",
    "Rows",
    "Splits",
    "Table",
    "encode",
    "limit_demonstrated",
    "limit_levels",
]

"""Problems with verifiable answers: where they come from, and how they become tokens."""

from __future__ import annotations

from upge.data.arithmetic import Arithmetic
from upge.data.encode import Encoded, Example, encode
from upge.data.gsm8k import GSM8K
from upge.data.problem import Problem, Splits

__all__ = ["GSM8K", "Arithmetic", "Encoded", "Example", "Problem", "Splits", "encode"]

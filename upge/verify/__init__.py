"""Rewards: verifiers, and the pool of processes that runs them under a hard limit of time and memory.

A verifier is any callable (response, answer, prompt=None) → reward in [0, 1]. `load` finds one by name, `VerifierPool`
scores lists of responses, or each one as it comes. Nothing here imports math_verify before a verifier has to parse
mathematics.
"""

from upge.verify.answers import final_answer, final_text, last_boxed
from upge.verify.base import Item, Verdict
from upge.verify.loading import Verifier, load
from upge.verify.pool import VerifierPool

__all__ = ["Item", "Verdict", "Verifier", "VerifierPool", "final_answer", "final_text", "last_boxed", "load"]

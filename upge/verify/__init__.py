"""Rewards: verifiers, and the pool of processes that runs them under a hard time limit.

A verifier is any callable (response, answer, prompt=None) → reward in [0, 1]. `load` finds one by name, `VerifierPool`
scores lists of responses. Nothing here imports math_verify before a verifier has to parse mathematics.
"""

from upge.verify.boxed import last_boxed
from upge.verify.loading import Verifier, load
from upge.verify.pool import Verdict, VerifierPool

__all__ = ["Verdict", "Verifier", "VerifierPool", "last_boxed", "load"]

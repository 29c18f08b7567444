"""Verifiers, which compute rewards, and a pool of processes that runs them with limits on time and memory.

A verifier is any callable (response, answer, prompt=None) → reward in [0, 1]. `load` finds one by name. `VerifierPool`
scores lists of responses, or single responses as they arrive. sympy and latex2sympy2_extended are imported only when
a verifier has to parse mathematics.
"""

from upge.verify.answers import final_answer, final_text, last_boxed
from upge.verify.base import Item, Verdict, Verifier, VerifierError, load
from upge.verify.pool import VerifierPool

__all__ = [
    "Item",
    "Verdict",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "final_answer",
    "final_text",
    "last_boxed",
    "load",
]

"""Verifiers, which compute rewards, and a pool of processes that runs them with limits on time and memory.

A verifier is any callable (response, answer, prompt=None) → reward. It may have further parameters, and it may compare
the responses to a prompt (`Declared`). `load` finds a verifier by name. `VerifierPool` scores lists of responses, or
single responses as they arrive. sympy and latex2sympy2_extended are imported only when mathematics has to be parsed.
"""

from upge.verify.answers import final_answer, final_text, last_boxed
from upge.verify.base import Item, Member, NamedReward, Verdict, Verifier, VerifierError, load
from upge.verify.declared import Declared
from upge.verify.pool import VerifierPool
from upge.verify.reward import Reward, terms

__all__ = [
    "Declared",
    "Item",
    "Member",
    "NamedReward",
    "Reward",
    "Verdict",
    "Verifier",
    "VerifierError",
    "VerifierPool",
    "final_answer",
    "final_text",
    "last_boxed",
    "load",
    "terms",
]

"""The conformance suite: checks that a part or an algorithm obeys the rules that the rest of the code relies on.

Use it for your own parts: `upge.testing.check_component(MyAdvantage())` in a test raises `ConformanceError` with one
sentence that names the broken rule and the fix.
"""

from upge.testing.algorithms import check_algorithm
from upge.testing.batches import random_batch
from upge.testing.components import check_component
from upge.testing.rules import ConformanceError

__all__ = ["ConformanceError", "check_algorithm", "check_component", "random_batch"]

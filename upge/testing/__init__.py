"""The conformance suite: does a part, or an algorithm, obey the rules that the rest of the code relies on?

For users' own parts: `upge.testing.check_component(MyAdvantage())` in a test raises `ConformanceError` with one
sentence that says which rule is broken and how to mend it.
"""

from upge.testing.algorithms import check_algorithm
from upge.testing.batches import random_batch
from upge.testing.components import check_component
from upge.testing.rules import ConformanceError

__all__ = ["ConformanceError", "check_algorithm", "check_component", "random_batch"]

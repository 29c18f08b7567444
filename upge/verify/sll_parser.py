"""math-verify's parser, with the faster of antlr's two ways of predicting tried first.

Half of the time that math-verify takes goes into predictions with "full context", whose results antlr does not keep.
Without that context (SLL) "the parser will either return a correct parse tree (i.e. the same parse tree that would be
returned with the LL prediction mode), or it will report a syntax error" (antlr4.atn.PredictionMode); then, and only
then, the text is parsed once more as math-verify does it. So what is read is the same, and so are the verdicts.
"""

from __future__ import annotations


def use_sll_prediction() -> None:
    """Has math-verify parse this way in the whole process: for processes that do nothing else. Once is enough."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2 as module

    exact = module._Latex2Sympy
    if hasattr(exact, "is_hasty"):
        return

    class Hasty(exact):
        """Reads a text, and where that fails, once more from its beginning, all of the first attempt forgotten."""

        is_hasty = True

        def create_parser(self, latex_str):  # the name of the argument is math-verify's
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = PredictionMode.SLL if self.is_hasty else PredictionMode.LL
            return parser

        def parse(self, latex_str):
            self.is_hasty, before = True, dict(self.var)
            try:
                return super().parse(latex_str)
            except Exception:
                self.is_hasty, self.variances, self.var = False, {}, before
                return super().parse(latex_str)

    module._Latex2Sympy = Hasty

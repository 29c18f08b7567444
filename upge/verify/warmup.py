r"""Makes math-verify faster in a verification server, before the server forks its workers.

`use_sll_prediction` selects the faster of antlr's two prediction modes. math-verify spends half of its time in
predictions with full context (LL), whose results antlr does not cache. Without that context (SLL) "the parser will
either return a correct parse tree (i.e. the same parse tree that would be returned with the LL prediction mode), or it
will report a syntax error" (antlr4.atn.PredictionMode). Only after an error is the text parsed again, in LL mode. So
parse trees and verdicts do not change.

`ANSWERS` holds typical answers. Verifying them fills the caches of antlr and sympy, which takes 0.8 s, in parallel
with the caller's own work. Without it, an answer that has to be parsed takes 12 ms of CPU during the first hundred
answers of a process; with it, 6 ms. Later on it takes 3 ms. Workers inherit the filled caches, including workers that
replace killed ones.
"""

from __future__ import annotations


def use_sll_prediction() -> None:
    """Selects SLL prediction in math-verify for the whole process; further calls do nothing."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2 as module

    original = module._Latex2Sympy
    if hasattr(original, "is_sll"):
        return

    class SLLFirst(original):
        """Parses in SLL mode, and if that fails, from the initial state in LL mode."""

        is_sll = True

        def create_parser(self, latex_str):  # the name of the argument is math-verify's
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = PredictionMode.SLL if self.is_sll else PredictionMode.LL
            return parser

        def parse(self, latex_str):
            self.is_sll, before = True, dict(self.var)
            try:
                return super().parse(latex_str)
            except Exception:
                self.is_sll, self.variances, self.var = False, {}, before
                return super().parse(latex_str)

    module._Latex2Sympy = SLLFirst


ANSWERS = (
    (r"\frac{3}{4}", r"0.75"),
    (r"\frac{3}{4}", r"-\frac{6\pi}{8}"),
    (r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt 3}{2}"),
    (r"2+\sqrt{5}", r"\sqrt{5}+\frac{4}{2}"),
    (r"12\pi", r"(12)\pi"),
    (r"2^{10}", r"1024"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"(x-3)(x+5)", r"x^2+2x-14"),
    (r"y=2x+3", r"2x+3"),
    (r"(3,-4)", r"(3, -\frac{8}{2})"),
    (r"\left(\frac{1}{2},\frac{3}{4}\right)", r"(0.5,0.75)"),
    (r"1,2,3", r"3,2,1"),
    (r"[-1,3)", r"[-1,\frac{6}{2})"),
    (r"[-2,7]", r"-2\le x\le 7"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)\cup(3,4)"),
    (r"2+3i", r"3i+2"),
    (r"\begin{pmatrix}-1\\ \frac{1}{2}\\0\end{pmatrix}", r"\begin{pmatrix}-1\\0.5\\0\end{pmatrix}"),
    (r"\text{(C)}", r"\text{C}"),
    (r"10\%", r"0.1"),
)
"""Pairs of a ground truth and an answer, some equal and some not."""

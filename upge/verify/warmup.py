r"""What a server judges before it forks its workers: antlr and sympy fill their caches with the usual kinds of answers.

Of the answers that have to be parsed, one costs 12 ms of CPU in the first hundred that a process judges, 6 ms after
these, and 3 ms later on; they take 0.8 s, beside whatever the caller does. Workers inherit what the server has learned,
those, too, that replace killed ones.
"""

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
"""Pairs of a ground truth and an answer, equal and unequal."""

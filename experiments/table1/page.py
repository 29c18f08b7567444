"""The contents of docs/table1.md: the table as Markdown and LaTeX, notes on the rows, and the proofs.

Each row starts from the written objective of an algorithm of this repository. Sympy differentiates it by the
probability of one token of a two-token response, at points on both sides of every bound. The derivative, divided by the
weight of the average, is the row's gradient. Dividing Â, mask and shape by it gives π_ref.
"""

from __future__ import annotations

import functools

import sympy as sp
from sympy import Expr

from experiments.results import DOCS, replace_block
from experiments.table1.statements import (
    ADVANTAGE,
    OLD,
    RATIO,
    STATEMENTS,
    THETA,
    Method,
    Statement,
    readings,
    statement,
)
from upge.theory.symbolic import Proof

PAGE = DOCS / "table1.md"
BEGIN, END = "<!-- {}: begin (python -m experiments.table1 --docs) -->", "<!-- {}: end -->"
_LATEX = {THETA: r"\pi_\theta", OLD: r"\pi_{old}", ADVANTAGE: r"\hat A", RATIO: "s"}
METHODS = (
    Method("SFT", "sft", "sft", "exact everywhere"),
    Method("PPO", "ppo", "rl", "the file whitens the GAE over the batch and pays a KL penalty within it"),
    Method("GRPO", "grpo", "rl", "exact off the clip's edges, where the objective has kinks"),
    Method("REINFORCE", "reinforce", "rl", "exact everywhere"),
    Method(
        "CISPO",
        "cispo",
        "rl",
        "the paper's π_ref = π_old holds below the bound alone; above it no mask stops the token, which keeps its "
        "gradient with the weight at the bound",
    ),
    Method(
        "GSPO",
        "gspo",
        "rl",
        "π_ref = π_θ/s is the paper's π_θ·(π_old(τ)/π_θ(τ))^(1/|τ|); ratio and mask are the response's",
    ),
    Method("SRFT (offline)", "srft offline", "offline", "the offline part; the method's other three have π_ref = π_θ"),
    Method(
        "LUFFY (offline)",
        "luffy",
        "offline",
        "the offline part; the paper's Â is divided by the standard deviation, the file's is not, as in the method's "
        "own script",
    ),
)


def _decimal(expression: Expr) -> Expr:
    """The expression with decimals such as 0.1 in place of fractions such as 1/10."""
    return expression.replace(lambda e: e.is_Rational and not e.is_Integer, lambda e: sp.Float(float(e), 4))


def text(expression: Expr) -> str:
    """The expression as Unicode text."""
    return str(_decimal(expression)).replace("**2", "²").replace("*", "·").replace(" + ", "+")


def latex(expression: Expr) -> str:
    """The expression in LaTeX."""
    return sp.latex(_decimal(expression), symbol_names=_LATEX)


def _stop(method: Method, style: str) -> str:
    """Mask and shape, the factors with a separate column in the paper's table."""
    estimator = method.part.estimator
    gradient = {"text": " · ∇π_θ", "latex": r"\nabla\pi_\theta"}[style]
    factors = [getattr(part.formula(), style) for part in (estimator.mask, estimator.likelihood)]
    factors = [f.replace(gradient, "") for f in factors if f not in ("1", "∇π_θ", r"\nabla\pi_\theta")]
    return " · ".join(factors) if style == "text" else r"\cdot ".join(factors)


def table() -> str:
    """The table in Markdown: a row per method, a line per region within it."""
    lines = ["| method | π_ref | Â | mask, shape | gradient of a token |", "|---|---|---|---|---|"]
    for method in METHODS:
        moving = [reading for reading in readings(method) if reading.reference is not None]
        where = [f" where {r.where}" if r.where else "" for r in moving]
        references = "; ".join(f"{text(r.reference)}{w}" for r, w in zip(moving, where, strict=True))
        masked = len(moving) < len(readings(method))
        gradients = "; ".join(
            f"{'1_stable · ' if masked else ''}{text(r.gradient)} · ∇π_θ{w}" for r, w in zip(moving, where, strict=True)
        )
        advantage = method.part.estimator.advantage.formula().text
        cells = [method.name, references, advantage, _stop(method, "text") or "none", gradients]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def table1_latex() -> str:
    """The table in LaTeX; needs the packages amsmath, amssymb and booktabs."""
    rows = []
    for method in METHODS:
        moving = [reading for reading in readings(method) if reading.reference is not None]
        masked = len(moving) < len(readings(method))
        for number, reading in enumerate(moving):
            where = rf"\ ({reading.where})" if reading.where else ""
            stable = r"\mathbb{1}_{stable}\," if masked else ""
            first = [
                method.name,
                f"${latex(reading.reference)}{where}$",
                f"${method.part.estimator.advantage.formula().latex}$" if not number else "",
                (f"${_stop(method, 'latex')}$" if _stop(method, "latex") else "none") if not number else "",
                rf"${stable}{latex(reading.gradient)}\,\nabla\pi_\theta$",
            ]
            rows.append("    " + " & ".join(first if not number else ["", *first[1:]]) + r" \\")
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            r"  \begin{tabular}{lllll}",
            r"    \toprule",
            r"    method & $\pi_{ref}$ & $\hat A$ & mask, shape & gradient of a token \\",
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"  \caption{The factor in front of $\nabla\pi_\theta$, up to the weight of the average, derived from each",
            r"    objective; $r=\pi_\theta/\pi_{old}$, $s=(\pi_\theta(\tau)/\pi_{old}(\tau))^{1/|\tau|}$.}",
            r"\end{table}",
        ]
    )


def notes() -> str:
    """A note on each row: its file, and where it is exact."""
    lines = []
    for method in METHODS:
        stopped_readings = [reading for reading in readings(method) if reading.reference is None]
        stopped = "; where the mask is 0, so is the derivative" if stopped_readings else ""
        weight = method.part.reduction.formula().text
        name = statement(method.proof).algorithm
        lines.append(f"- **{method.name}** (`{name}`, term `{method.term}`, w = {weight}): {method.note}{stopped}.")
    return "\n".join(lines)


@functools.cache
def proven(claim: Statement) -> Proof:
    """The proof of a statement, computed once."""
    return claim.prove()


def proofs() -> str:
    """A Markdown table with a row per statement: what was compared, and in how many regions."""
    lines = ["| file, with | ∂J/∂x compared | regions | holds |", "|---|---|---|---|"]
    for claim in STATEMENTS:
        proof = proven(claim)
        extra = [f"correction={name}" for name in claim.corrections] + [f"term {name}" for name in claim.terms]
        what = ", ".join([f"`{claim.algorithm}`", *extra, *(f"`{item}`" for item in claim.overrides)])
        lines.append(f"| {what} | {proof.compared} | {proof.cells} | {'yes' if proof.holds else 'NO'} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The text of the page with the parts between its markers updated.

    Raises:
        ConfigError: a pair of markers is missing.
    """
    parts = {
        "table": table(),
        "notes": notes(),
        "latex": f"```latex\n{table1_latex()}\n```",
        "proofs": proofs(),
    }
    for name, made in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        page = replace_block(page, PAGE.name, begin, end, f"\n\n{made}\n\n", f"where the {name} go")
    return page

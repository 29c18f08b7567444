"""Derive Table 1 of arXiv 2509.04419: `python -m experiments.table1` prints it, `--latex` as LaTeX.

`--docs` updates docs/table1.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import sympy as sp
from sympy import Expr

from experiments import cli
from experiments.files import DOCS, replace_block
from experiments.grid import markdown_table
from experiments.table1 import ADVANTAGE, OLD, RATIO, STATEMENTS, THETA, Method, Reading, readings, statement
from upge.errors import ConfigError

PAGE = DOCS / "table1.md"
_LATEX = {THETA: r"\pi_\theta", OLD: r"\pi_{old}", ADVANTAGE: r"\hat A", RATIO: "s"}
METHODS = (
    Method("SFT", "sft", "sft", "exact everywhere"),
    Method("PPO", "ppo", "rl", "the file whitens the GAE over the batch and subtracts a KL penalty from its rewards"),
    Method("GRPO", "grpo", "rl", "exact off the clip's edges, where the objective has kinks"),
    Method("REINFORCE", "reinforce", "rl", "exact everywhere"),
    Method("CISPO", "cispo", "rl", "the paper's π_ref = π_old holds only below the bound; above it no mask drops the "
           "token, which keeps its gradient with the weight at the bound"),
    Method("GSPO", "gspo", "rl", "π_ref = π_θ/s is the paper's π_θ·(π_old(τ)/π_θ(τ))^(1/|τ|); ratio and mask are the "
           "response's"),
    Method("SRFT (offline)", "srft offline", "offline", "the offline part; the method's other three have π_ref = π_θ"),
    Method("LUFFY (offline)", "luffy", "offline", "the offline part; the paper's Â is divided by the standard "
           "deviation, the file's is not, as in the method's own script"),
)  # fmt: skip


def _decimal(expression: Expr) -> Expr:
    """The expression with decimals such as 0.1 in place of fractions such as 1/10."""
    return expression.replace(lambda e: e.is_Rational and not e.is_Integer, lambda e: sp.Float(float(e), 4))


def text(expression: Expr) -> str:
    """The expression as Unicode text."""
    return str(_decimal(expression)).replace("**2", "²").replace("*", "·").replace(" + ", "+")


def latex(expression: Expr) -> str:
    """The expression in LaTeX."""
    return sp.latex(_decimal(expression), symbol_names=_LATEX)


def _stop(method: Method, style: str, gradient: str) -> str:
    """Mask and shape without the gradient: the factors that have a column of their own in the paper's table."""
    estimator = method.part.estimator
    factors = [getattr(part.formula(), style) for part in (estimator.mask, estimator.likelihood)]
    return (" · " if style == "text" else r"\cdot ").join(
        f.replace(f"{' · ' if style == 'text' else ''}{gradient}", "") for f in factors if f not in ("1", gradient)
    )


def _moving(method: Method) -> tuple[list[Reading], bool]:
    """The regions in which the token is not masked, and whether there is another one."""
    moving = [reading for reading in readings(method) if reading.reference is not None]
    return moving, len(moving) < len(readings(method))


def table() -> str:
    """The table in Markdown: a row per method.

    Each row starts from the written objective of an algorithm of this repository. Sympy differentiates it by the
    probability of one token of a two-token response, at points on both sides of every bound. The derivative, divided by
    the weight of the average, is the row's gradient. Dividing Â, mask and shape by it gives π_ref.
    """
    rows = []
    for method in METHODS:
        moving, masked = _moving(method)
        where = [f" where {r.where}" if r.where else "" for r in moving]
        references = "; ".join(f"{text(r.reference)}{w}" for r, w in zip(moving, where, strict=True))
        stable = "1_stable · " if masked else ""
        gradients = "; ".join(f"{stable}{text(r.gradient)} · ∇π_θ{w}" for r, w in zip(moving, where, strict=True))
        advantage = method.part.estimator.advantage.formula().text
        cells = [method.name, references, advantage, _stop(method, "text", "∇π_θ") or "none", gradients]
        rows.append([cell.replace("|", r"\|") for cell in cells])
    return markdown_table(["method", "π_ref", "Â", "mask, shape", "gradient of a token"], rows)


def table1_latex() -> str:
    """The table in LaTeX; needs the packages amsmath, amssymb and booktabs."""
    rows = []
    for method in METHODS:
        moving, masked = _moving(method)
        stop, stable = _stop(method, "latex", r"\nabla\pi_\theta"), r"\mathbb{1}_{stable}\," if masked else ""
        first = (method.name, f"${method.part.estimator.advantage.formula().latex}$", f"${stop}$" if stop else "none")
        for number, reading in enumerate(moving):
            name, advantage, factors = ("", "", "") if number else first
            where = rf"\ ({reading.where})" if reading.where else ""
            gradient = rf"${stable}{latex(reading.gradient)}\,\nabla\pi_\theta$"
            cells = (name, f"${latex(reading.reference)}{where}$", advantage, factors, gradient)
            rows.append(f"    {' & '.join(cells)} \\\\")
    return "\n".join([
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
    ])  # fmt: skip


def notes() -> str:
    """A note on each row: its file, and where it is exact."""
    lines = []
    for method in METHODS:
        stopped = "; where the mask is 0, so is the derivative" if _moving(method)[1] else ""
        weight = method.part.reduction.formula().text
        name = statement(method.proof).algorithm
        lines.append(f"- **{method.name}** (`{name}`, term `{method.term}`, w = {weight}): {method.note}{stopped}.")
    return "\n".join(lines)


def proofs() -> str:
    """A Markdown table with a row per statement: what was compared, and in how many regions."""
    rows = []
    for claim in STATEMENTS:
        extra = [f"correction={name}" for name in claim.corrections] + [f"term {name}" for name in claim.terms]
        what = ", ".join([f"`{claim.algorithm}`", *extra, *(f"`{item}`" for item in claim.overrides)])
        rows.append([what, claim.proof.compared, claim.proof.cells, "yes" if claim.proof.holds else "NO"])
    return markdown_table(["file, with", "∂J/∂x compared", "regions", "holds"], rows)


def updated(page: str) -> str:
    """The text of the page with the parts between its markers updated.

    Raises:
        ConfigError: a pair of markers is missing.
    """
    parts = {"table": table(), "notes": notes(), "latex": f"```latex\n{table1_latex()}\n```", "proofs": proofs()}
    for name, made in parts.items():
        begin, end = f"<!-- {name}: begin (python -m experiments.table1 --docs) -->", f"<!-- {name}: end -->"
        page = replace_block(page, PAGE.name, begin, end, f"\n\n{made}\n\n", f"where the {name} go")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or update the page; return the exit code, 2 on bad input, 1 if a proof fails."""
    return cli.run_command(_table1, arguments, lambda everything: str(__doc__))


def _table1(arguments: list[str]) -> int:
    if arguments == ["--docs"]:
        PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")
        return 0 if all(claim.proof.holds for claim in STATEMENTS) else 1
    if arguments not in ([], ["--latex"]):
        raise ConfigError(f"'{arguments[0]}': give --docs, --latex, or nothing at all")
    print(table1_latex() if arguments else f"{table()}\n\n{notes()}")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())

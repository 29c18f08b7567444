"""Formulas as text and as LaTeX: a factor, a product of factors, and a gradient as a sum of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from upge.errors import ConfigError


class Formula(NamedTuple):
    """The formula of a factor, as plain text in Unicode and as LaTeX math."""

    text: str
    latex: str


def tex(number: float) -> str:
    """A number as LaTeX: 10^{-6} where `:g` gives 1e-06."""
    digits, _, power = f"{number:g}".partition("e")
    if not power:
        return digits
    return (rf"{digits}\cdot " if digits not in ("1", "-1") else digits.rstrip("1")) + f"10^{{{int(power)}}}"


def times(factors: Sequence[Formula]) -> Formula:
    """The product of `factors`. Factors of 1 are left out; a product of no other factors is 1."""
    shown = [f for f in factors if f.text != "1"]
    return Formula(" · ".join(f.text for f in shown) or "1", r"\,".join(f.latex for f in shown) or "1")


#: Source → the sum over its trajectories.
SUMS = {
    "rollouts": Formula("Σ_{τ~π_old}", r"\sum_{\tau\sim\pi_{old}}"),
    "demonstrations": Formula("Σ_{τ* demo}", r"\sum_{\tau^*}"),
    "preference_pairs": Formula("Σ_{τ⁺,τ⁻}", r"\sum_{\tau^+,\tau^-}"),
    "all": Formula("Σ_τ", r"\sum_{\tau}"),
}


def weighted_sum(source: str, weights: Sequence[Formula], per_token: Formula) -> Formula:
    """Σ_τ weights · Σ_t per_token over the trajectories τ of a source and their tokens t."""
    outer, inner = SUMS[source], times(weights)
    return Formula(
        f"{outer.text} {inner.text} · Σ_t {per_token.text}",
        rf"{outer.latex} {inner.latex}\,\sum_t {per_token.latex}",
    )


def render(terms: Mapping[str, Formula], regularizers: Mapping[str, Formula], style: str) -> str:
    """∇J as 'text', with one line per term and regularizer, or as 'latex'.

    Raises:
        ConfigError: `style` is neither.
    """
    if style not in ("text", "latex"):
        raise ConfigError(f"formula style: found {style!r}; use 'text' or 'latex'")
    lines = [getattr(formula, style) for formula in (*terms.values(), *regularizers.values())]
    if style == "latex":
        return r"\nabla J = " + " + ".join(lines).replace("+ +", "+").replace("+ -", "-")
    # A regularizer's formula includes its sign.
    signs = ["∇J ="] + ["   +"] * (len(terms) - 1) + ["    "] * len(regularizers)
    labels = (*terms, *regularizers)
    return "\n".join(f"{a} {b}   [{label}]" for a, b, label in zip(signs, lines, labels, strict=True))

"""An algorithm in print: the sum of its terms' products, as text and as LaTeX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upge.errors import ConfigError

if TYPE_CHECKING:
    from upge.algorithm import Algorithm, Term

_SUMS = {
    "rollouts": ("Σ_{τ~π_old}", r"\sum_{\tau\sim\pi_{old}}"),
    "demonstrations": ("Σ_{τ* demo}", r"\sum_{\tau^*}"),
    "preference_pairs": ("Σ_{τ⁺,τ⁻}", r"\sum_{\tau^+,\tau^-}"),
    "all": ("Σ_τ", r"\sum_{\tau}"),
}


def render(algorithm: Algorithm, style: str) -> str:
    """The gradient that `algorithm` ascends, a line a term; `style` is 'text' or 'latex'.

    Raises:
        ConfigError: another style.
    """
    if style not in ("text", "latex"):
        raise ConfigError(f"formula style: found {style!r}; use 'text' or 'latex'")
    lines = [_term(term, style) for term in algorithm.terms.values()]
    lines += [getattr(regularizer.formula(), style) for regularizer in algorithm.regularizers.values()]
    if style == "latex":
        return r"\nabla J = " + " + ".join(lines).replace("+ +", "+").replace("+ -", "-")
    labels = [*algorithm.terms, *algorithm.regularizers]
    lead = ["∇J ="] + ["   +"] * (len(algorithm.terms) - 1) + ["    "] * len(algorithm.regularizers)
    return "\n".join(f"{a} {b}   [{name}]" for a, b, name in zip(lead, lines, labels, strict=True))


def _term(term: Term, style: str) -> str:
    gate, w = (getattr(part.formula(), style) for part in (term.gate, term.reduction))
    product = getattr(term.estimator.formula(), style)
    front = [f"{term.coefficient:g}"] if term.coefficient != 1 else []
    front += [gate] if gate != "1" else []
    text = style == "text"
    joint, tokens = (" · ", "Σ_t") if text else (r"\,", r"\sum_t")
    return joint.join([f"{_SUMS[term.source][0 if text else 1]} {joint.join([*front, w])}", f"{tokens} {product}"])

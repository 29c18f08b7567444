"""The heaviest tokens in their text: each token of a response coloured by the weight that it has in a term."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.table import number

SHADES = 8  # of each colour, in the style sheet
LONGEST_PROMPT = 1200


def token_texts(lines: Iterable[dict]) -> list[dict[str, Any]]:
    """Terms with their trajectories, as the page shows lines of tokens/step_*.jsonl; lines it cannot read are left out.

    The strongest colour is the largest absolute weight of the term in these lines.
    """
    terms: dict[str, list[dict]] = {}
    for line in lines:
        if _readable(line):
            terms.setdefault(str(line["term"]), []).append(line)
    return [
        {"term": term, "trajectories": [_trajectory(line, _largest(own)) for line in own]}
        for term, own in terms.items()
    ]


def _readable(line: dict) -> bool:
    columns = [line.get(name) for name in ("tokens", "weights", "relative")]
    return "term" in line and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1


def _largest(lines: Sequence[dict]) -> float:
    return max((abs(number(weight) or 0.0) for line in lines for weight in line["weights"]), default=0.0)


def _trajectory(line: dict, largest: float) -> dict[str, Any]:
    reward, gate = number(line.get("reward")), number(line.get("gate"))
    kind = "demonstration" if line.get("is_demonstration") else "rollout"
    facts = [
        kind,
        f"reward {reward:g}" if reward is not None and kind == "rollout" else "",
        str(line.get("level") or ""),
        f"gate {gate:g}" if gate is not None else "",
        _top(line),
    ]
    first, length = (int(number(line.get(name)) or 0) for name in ("first", "length"))
    prompt = str(line.get("prompt") or "")
    return {
        "prompt": prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[:LONGEST_PROMPT]} …",
        "facts": [fact for fact in facts if fact],
        "before": first,
        "after": max(0, length - first - len(line["tokens"])),
        "runs": _runs(line, largest),
    }


def _top(line: dict) -> str:
    """The weight at the token that pulls most."""
    sizes = [abs(number(weight) or 0.0) for weight in line["weights"]]
    return f"largest weight {_printed(line['relative'][sizes.index(max(sizes))])}" if sizes else ""


def _runs(line: dict, largest: float) -> list[dict[str, str]]:
    """Neighbouring tokens with the same colour and the same weight in print, as one text."""
    marked = [
        (_shade(weight, largest), _printed(relative), _visible(str(token)))
        for token, weight, relative in zip(line["tokens"], line["weights"], line["relative"], strict=True)
    ]
    return [
        {"shade": shade, "weight": weight, "text": "".join(text for _, _, text in run)}
        for (shade, weight), run in itertools.groupby(marked, key=lambda one: one[:2])
    ]


def _shade(weight: object, largest: float) -> str:
    """The class of a token: p1 to p8 for a positive weight, n1 to n8 for a negative one, empty for 0."""
    value = number(weight)
    if value is None:
        return "odd"
    if value == 0 or largest == 0:
        return ""
    return f"{'p' if value > 0 else 'n'}{max(1, round(SHADES * abs(value) / largest))}"


def _printed(relative: object) -> str:
    value = number(relative)
    return "no finite number" if value is None else f"{value:+.3g}"


def _visible(token: str) -> str:
    """A line's end has no width to be coloured, so it is shown by a sign."""
    return token.replace("\n", "↵\n")

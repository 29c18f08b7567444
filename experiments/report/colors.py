"""Colors of difficulty levels and of runs: one for each, however many there are, in every chart of a page."""

from __future__ import annotations

from collections.abc import Iterable

#: Lightness and chroma on a light and on a dark page. Neighbors alternate, so that more than the hue tells them apart.
_LIGHT, _DARK = ((0.47, 0.15), (0.62, 0.13)), ((0.84, 0.12), (0.68, 0.14))
_FIRST_HUE = 250  # blue


def color_names(items: Iterable[str]) -> dict[str, str]:
    """Item → the name of its color in the style sheet: l0, l1, ..."""
    return {item: f"l{number}" for number, item in enumerate(dict.fromkeys(items))}


def color_values(count: int) -> list[tuple[str, str]]:
    """The values of l0, l1, ... on a light and on a dark page: hues at equal distances around the circle."""
    hues = [(_FIRST_HUE + 360 * number / max(1, count)) % 360 for number in range(count)]
    return [(_oklch(*_LIGHT[i % 2], hue), _oklch(*_DARK[i % 2], hue)) for i, hue in enumerate(hues)]


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    return f"oklch({lightness:.2f} {chroma:.2f} {hue:.1f})"

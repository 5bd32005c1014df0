"""Colours of the charts and of the page, once for print and once as CSS variables that follow the reader's scheme.

The twelve series colours were chosen by maximising the smallest OKLab distance between any two of them under normal
vision, protanopia and deuteranopia (0.107 for the light list, 0.080 for the dark one), at a contrast of at least 3:1 to
the page. Colour is never the only cue: bars and lines carry their names, lines their own markers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIGHT_SERIES = (
    "#0f64bf", "#e17f08", "#077206", "#be73b8", "#721026", "#35a1f8",
    "#da154c", "#610b6c", "#7ca885", "#1e13ad", "#ab247e", "#6767ff",
)  # fmt: skip
DARK_SERIES = (
    "#4d8bf5", "#d58207", "#7ee147", "#b58aab", "#f47a7b", "#2f96d6",
    "#e8434f", "#f8d8fd", "#b3fab1", "#a0bef9", "#d6a8bc", "#838df3",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")

_LIGHT = {
    "ink": "#1b2028", "muted": "#596372", "grid": "#dfe3e9", "surface": "#ffffff", "neutral": "#8b94a3",
    "phase0": "#c3cad5", "phase1": "#c9820a", "phase2": "#4a5d7a", "phase3": "#161d2b",
    "phase4": "#93a8c9", "phase5": "#e7d9c3",
}  # fmt: skip
_DARK = {
    "ink": "#e8ebf0", "muted": "#a0a9b8", "grid": "#2e3541", "surface": "#161a21", "neutral": "#7d8798",
    "phase0": "#3f4856", "phase1": "#e0a33a", "phase2": "#8ba3c7", "phase3": "#e3e9f3",
    "phase4": "#53709c", "phase5": "#57492f",
}  # fmt: skip


@dataclass(frozen=True)
class Theme:
    """What charts are drawn with.

    Attributes:
        ink: text.
        muted: secondary text and reference lines.
        grid: grid lines.
        surface: what the chart stands on.
        neutral: methods that are no drafter of ours.
        series: one colour per drafter, in turn.
        phases: prefill, draft, verify, commit, other loops' decoding, the rest.
    """

    ink: str
    muted: str
    grid: str
    surface: str
    neutral: str
    series: Sequence[str]
    phases: Sequence[str]

    def color(self, index: int | None) -> str:
        """The colour of a series; None is what is no drafter of ours."""
        return self.neutral if index is None else self.series[index % len(self.series)]


def _theme(roles: dict[str, str], series: Sequence[str]) -> Theme:
    plain = {name: roles[name] for name in ("ink", "muted", "grid", "surface", "neutral")}
    return Theme(**plain, series=series, phases=[roles[f"phase{index}"] for index in range(6)])


PRINT = _theme(_LIGHT, LIGHT_SERIES)

# Charts for the page are drawn in colours that stand for CSS variables: matplotlib only knows colours.
VARIABLES = (*_LIGHT, *(f"c{index}" for index in range(len(LIGHT_SERIES))))
PLACEHOLDERS = {name: f"#fe{index:02x}01" for index, name in enumerate(VARIABLES)}
ON_PAGE = _theme(PLACEHOLDERS, [PLACEHOLDERS[f"c{index}"] for index in range(len(LIGHT_SERIES))])


def css_variables(dark: bool) -> str:
    """The declarations of one scheme: ``--ink: #...; ...; --c0: #...;``."""
    roles, series = (_DARK, DARK_SERIES) if dark else (_LIGHT, LIGHT_SERIES)
    values = {**roles, **{f"c{index}": color for index, color in enumerate(series)}}
    return " ".join(f"--{name}: {values[name]};" for name in VARIABLES)

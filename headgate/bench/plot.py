"""A bar chart as SVG, in plain Python: output tokens per second of each server in each case."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from headgate.bench.results import Session, middle

_WIDTH, _BAR, _GAP, _LEFT, _RIGHT, _TOP = 860, 18, 22, 230, 90, 40
_COLOURS = {"bf16": "#4c78a8", "bf16-medium": "#72b7b2", "int8": "#f58518", "int4": "#54a24b"}
_PALE = "0.55"  # opacity of the peers' bars
_OWN = "Headgate"


def throughput_chart(session: Session) -> str:
    """One group of bars per case, all to one scale."""
    groups = []
    for case in session.cases():
        bars = [
            (server, kind, middle(run.result["output_tokens_per_s"] for run in runs))
            for server, kind in session.servers()
            if (runs := session.of(server, kind, case))
        ]
        groups.append((f"{case[0]}, {case[1]} at a time", bars))
    longest = max((rate for _, bars in groups for _, _, rate in bars), default=1.0)
    parts, y = [], _TOP
    for title, bars in groups:
        parts.append(_text(8, y + 13, title, "font-weight='bold'"))
        y += _BAR + 4
        for server, kind, rate in bars:
            parts += _bar(y, server, kind, rate, rate / longest)
            y += _BAR + 2
        y += _GAP
    return _document(y, parts)


def _bar(y: int, server: str, kind: str, rate: float, share: float) -> Sequence[str]:
    width = max(1.0, share * (_WIDTH - _LEFT - _RIGHT))
    opacity = "1" if server == _OWN else _PALE
    colour = _COLOURS.get(kind, "#888888")
    return (
        _text(_LEFT - 8, y + 13, f"{server} {kind}", "text-anchor='end'"),
        f"<rect x='{_LEFT}' y='{y}' width='{width:.1f}' height='{_BAR}' fill='{colour}' "
        f"fill-opacity='{opacity}'/>",
        _text(_LEFT + width + 6, y + 13, f"{rate:.0f}"),
    )


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {extra}>{escape(text)}</text>"


def _document(height: int, parts: Sequence[str]) -> str:
    title = _text(8, 20, "Output tokens per second, median", "font-size='15'")
    body = "\n".join((title, *parts))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
        "font-family='sans-serif' font-size='12' fill='#222222'>\n"
        f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>\n{body}\n</svg>\n"
    )

"""How models learn, as a table and as a picture: both follow from the record, to the byte."""

import statistics
from collections.abc import Mapping
from typing import Any

CURVES = "curves.svg"
# Colours that are told apart by eyes of all kinds (Okabe and Ito, 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 320, 48, 16, 150, 40


def means(curve: Mapping[str, Any]) -> list[float]:
    """Over the seeds, at each step."""
    return [statistics.fmean(values) for values in zip(*curve["exact_match"], strict=True)]


def draw(record: Mapping[str, Any]) -> str | None:
    """An SVG of the means over the seeds, with the range of the seeds behind them; None without curves."""
    curves = record.get("curves")
    if not curves:
        return None
    last = max(max(curve["step"]) for curve in curves.values())
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: float) -> str:
        return f"{_LEFT + across * step / last:.1f}"

    def y(value: float) -> str:
        return f"{_TOP + down * (1 - value):.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        lines.append(f'<path d="M{_LEFT} {y(tick)}H{_LEFT + across}" stroke="#dddddd"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y(tick)}" dy="4" text-anchor="end">{tick:.0%}</text>')
    for step in next(iter(curves.values()))["step"]:
        lines.append(f'<text x="{x(step)}" y="{_HEIGHT - 22}" text-anchor="middle">{step:g}</text>')
    lines.append(f'<text x="{_LEFT + across / 2:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">optimiser steps</text>')
    for i, (model, curve) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        seeds = list(zip(*curve["exact_match"], strict=True))
        steps = curve["step"]
        upper = [f"{x(s)},{y(max(values))}" for s, values in zip(steps, seeds, strict=True)]
        lower = [f"{x(s)},{y(min(values))}" for s, values in zip(steps, seeds, strict=True)]
        lines.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity="0.15"/>')
        path = " ".join(f"{x(s)},{y(value)}" for s, value in zip(steps, means(curve), strict=True))
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        top = _TOP + 12 + 20 * i
        lines.append(f'<path d="M{_WIDTH - _RIGHT + 14} {top - 4}h18" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{_WIDTH - _RIGHT + 38}" y="{top}">{model}</text>')
    return "\n".join([*lines, "</svg>", ""])

"""Small plots as SVG: a few lines of our own, because a page that is kept must load nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 14, 26

POINTS_MAX = 2000
"""Dots of one plot: more can not be told apart, and make a page of megabytes."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points (Unix time, value) that belong together."""

    points: tuple[tuple[float, float], ...]
    label: str


@dataclass(frozen=True, slots=True)
class Dot:
    """One value; `kind` is a class of the style, `label` is shown on hovering."""

    at: float
    value: float
    kind: str
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a time."""

    at: float
    label: str


def duration(seconds: float) -> str:
    """A duration for people."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between `low` and `high`: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(dots: Sequence[Dot]) -> list[Dot]:
    """At most POINTS_MAX of them, evenly, with all that are not as usual."""
    if len(dots) <= POINTS_MAX:
        return list(dots)
    every = math.ceil(len(dots) / POINTS_MAX)
    return [dot for number, dot in enumerate(dots) if number % every == 0 or dot.kind == "danger"]


@dataclass(frozen=True, slots=True)
class _Scale:
    """From times and values to places in the drawing."""

    t0: float
    t1: float
    v0: float
    v1: float
    height: int

    def x(self, at: float) -> str:
        span = (self.t1 - self.t0) or 1.0
        return f"{LEFT + (at - self.t0) / span * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        span = (self.v1 - self.v0) or 1.0
        return f"{self.height - BOTTOM - (value - self.v0) / span * self.room:.1f}"

    @property
    def room(self) -> int:
        return self.height - TOP - BOTTOM


def plot(
    title: str,
    lines: Sequence[Line],
    dots: Sequence[Dot],
    marks: Sequence[Mark],
    *,
    shown: Callable[[float], str],
    height: int,
) -> str:
    """Values over time; values start at 0. `shown` writes a value on the axis."""
    points = [point for line in lines for point in line.points]
    points += [(dot.at, dot.value) for dot in dots]
    if not points:
        return '<p class="empty">Nothing is known yet.</p>'
    times = [at for at, _ in points] + [mark.at for mark in marks]
    top = max(value for _, value in points) * 1.05
    scale = _Scale(min(times), max(times), 0.0, top or 1.0, height)
    parts = [*_axes(scale, shown)]
    parts += [_mark(scale, mark) for mark in marks]
    parts += [_line(scale, line) for line in lines if len(line.points) > 1]
    parts += [_dot(scale, dot) for dot in thinned(dots)]
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"\n{body}\n</svg>"
    )


def _axes(scale: _Scale, shown: Callable[[float], str]) -> list[str]:
    parts = []
    for value in ticks(scale.v0, scale.v1):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = escape(shown(value)) if value else "0"
        parts.append(f'<text class="axis end" x="{LEFT - 8}" y="{float(y) + 4:.1f}">{label}</text>')
    places = {"start": scale.t0, "middle": (scale.t0 + scale.t1) / 2, "end": scale.t1}
    for place, at in places.items():
        text, x = _time(at, scale.t1 - scale.t0), scale.x(at)
        parts.append(f'<text class="axis {place}" x="{x}" y="{scale.height - 6}">{text}</text>')
    return parts


def _time(at: float, span: float) -> str:
    form = "%d %b %H:%M" if span >= 86400 else "%H:%M" if span >= 600 else "%H:%M:%S"
    return time.strftime(form, time.gmtime(at))


def _mark(scale: _Scale, mark: Mark) -> str:
    x = scale.x(mark.at)
    return (
        f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{scale.height - BOTTOM}">'
        f"<title>{escape(mark.label)}</title></line>"
    )


def _line(scale: _Scale, line: Line) -> str:
    step = max(len(line.points) // POINTS_MAX, 1)
    kept = [*line.points[::step], line.points[-1]]
    path = " ".join(f"{scale.x(at)},{scale.y(value)}" for at, value in kept)
    return f'<polyline points="{path}"><title>{escape(line.label)}</title></polyline>'


def _dot(scale: _Scale, dot: Dot) -> str:
    return (
        f'<circle class="{dot.kind}" cx="{scale.x(dot.at)}" cy="{scale.y(dot.value)}" r="3.2">'
        f"<title>{escape(dot.label)}</title></circle>"
    )


def split_bar(shares: Sequence[tuple[str, float, str]]) -> str:
    """A bar of parts of a whole, with a legend: (name, value in seconds, kind)."""
    whole = sum(value for _, value, _ in shares)
    if whole <= 0:
        return '<p class="empty">Nothing is known yet.</p>'
    at, parts = 0.0, []
    for name, value, kind in shares:
        width = value / whole * WIDTH
        label = f"{escape(name)}: {value / whole:.1%}"
        parts.append(
            f'<rect class="{kind}" x="{at:.2f}" y="0" width="{width:.2f}" height="18">'
            f"<title>{label}</title></rect>"
        )
        at += width
    legend = "".join(
        f'<li><i class="{kind}"></i>{escape(name)} <b>{value / whole:.1%}</b> '
        f"<span>{duration(value)}</span></li>"
        for name, value, kind in shares
    )
    bar = "".join(parts)
    return (
        f'<svg class="bar" viewBox="0 0 {WIDTH} 18" preserveAspectRatio="none" role="img" '
        f'aria-label="where the time went">{bar}</svg><ul class="legend">{legend}</ul>'
    )

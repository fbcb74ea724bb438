"""`plot_trace`: a trace file as a picture (layer 10).

    JSON of `trace` -> rows (worker, lane) -> bars, neighbours that would be thinner than a pixel joined -> SVG

Pure Python, in the caller's thread. One lane per worker thread, one colour per name, a time axis, a tooltip (`<title>`)
on each bar. Joining keeps the picture small: a million calls of a microsecond are one bar that says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

_LEFT, _RIGHT, _TOP = 150, 70, 34
_BAR, _ROW = 20, 26  # pixels
_THINNEST = 0.7  # pixels; calls below are joined with their neighbours of the same name
_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#ff9da7", "#86bcb6", "#8cd17d",
    "#d4a6c8", "#499894",
)  # fmt: skip
_OTHERS = "#bab0ac"
_BAD = "#d62728"  # red: no function has it
_STATUSES = {"ok": "", "error": "raised", "unsendable": "result could not be sent", "running": "still running"}


class _Bar(NamedTuple):
    """One call, or several that are too thin to be drawn; microseconds."""

    name: str
    begin: float
    end: float
    calls: int
    busy: float
    status: str
    detail: str


def plot_trace(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Draw a file that `trace` has written as SVG: one lane per worker, one colour per function (or label).

    Red frames: calls that raised; red bars: calls that died with their worker; pale bars: calls that were still
    running. The numbers on the right say what part of the time the worker was busy. OSError: a file cannot be read
    or written; ValueError: `path` is not a trace.

    Example: `distpool.plot_trace("calls.json", "calls.svg")`
    """
    with open(path, encoding="utf-8") as file:
        try:
            events, names = _read(json.load(file))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{os.fspath(path)} is not a trace file: {error}") from None
    picture = _draw(events, names)
    with open(out, "w", encoding="utf-8") as file:
        file.write(picture)


def _read(document: Any) -> tuple[dict[tuple[int, int], list[_Bar]], dict[tuple[int, int], str]]:
    """Bars by (pid, lane), sorted by begin, and the names of the lanes."""
    entries = document["traceEvents"] if isinstance(document, dict) else document
    rows: dict[tuple[int, int], list[_Bar]] = {}
    names: dict[tuple[int, int], str] = {}
    for entry in entries:
        place = int(entry["pid"]), int(entry.get("tid", 0))
        args = entry.get("args") or {}
        if entry["ph"] == "M" and entry["name"] == "process_name":
            names[place[0], 0] = _printable(args["name"])
            rows.setdefault((place[0], 0), [])
        elif entry["ph"] == "X":
            begin, duration = float(entry["ts"]), float(entry["dur"])
            if not math.isfinite(begin + duration):
                raise ValueError("a time must be a finite number")
            name, function = _printable(entry["name"]), _printable(args.get("function", ""))
            detail = function if function and function != name else ""
            status = _printable(args.get("status", "ok"))
            bar = _Bar(name, begin, begin + duration, 1, duration, status, detail)
            rows.setdefault(place, []).append(bar)
    for place, bars in rows.items():
        bars.sort(key=lambda bar: (bar.begin, -bar.end))
        names.setdefault(place, f"worker {place[0]}" if not place[1] else f"helper {place[1]}")
    return dict(sorted(rows.items())), names


def _printable(text: Any) -> str:
    """Names are anybody's: without what XML does not know, such as the surrogates of file names."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def _draw(rows: dict[tuple[int, int], list[_Bar]], names: dict[tuple[int, int], str], width: int = 1200) -> str:
    bars = [bar for row in rows.values() for bar in row]
    end = max([0.0, *(bar.end for bar in bars)]) or 1.0  # below 0: on a host whose clock is behind
    scale = (width - _LEFT - _RIGHT) / end
    totals: dict[str, list[float]] = {}
    for bar in bars:
        total = totals.setdefault(bar.name, [0, 0.0])
        total[0] += 1
        total[1] += bar.busy
    order = sorted(totals, key=lambda name: -totals[name][1])
    colours = {name: _COLOURS[i] if i < len(_COLOURS) else _OTHERS for i, name in enumerate(order)}
    bottom = _TOP + _ROW * max(1, len(rows))
    parts = list(_axis(end, scale, bottom, width))
    for index, (place, row) in enumerate(rows.items()):
        parts.extend(_lane(names[place], row, _TOP + _ROW * index, scale, end, colours, width))
    if not bars:
        parts.append(f'<text x="{_LEFT + 8}" y="{_TOP + 15}">no calls</text>')
    legend, height = _legend(order, totals, colours, bottom + 34, width)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
    )
    return head + "\n".join([*parts, *legend]) + "\n</svg>\n"


def _lane(
    name: str, row: list[_Bar], top: int, scale: float, end: float, colours: dict[str, str], width: int
) -> Iterable[str]:
    yield f'<text x="{_LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(name)}</text>'
    yield f'<rect x="{_LEFT}" y="{top + 3}" width="{width - _LEFT - _RIGHT}" height="{_BAR}" fill="#f4f4f4"/>'
    for bar in _joined(row, _THINNEST / scale):
        x, wide = _LEFT + bar.begin * scale, max(_THINNEST, (bar.end - bar.begin) * scale)
        style = f'fill="{_BAD if bar.status == "died" else colours[bar.name]}"'
        if bar.status in ("error", "unsendable"):
            style += f' stroke="{_BAD}" stroke-width="1.5"'
        elif bar.status == "running":
            style += ' fill-opacity="0.5"'
        yield (
            f'<rect x="{x:.2f}" y="{top + 3}" width="{wide:.2f}" height="{_BAR}" {style}>'
            f"<title>{escape(_tooltip(bar))}</title></rect>"
        )
    busy = 100 * _covered(row) / end
    yield f'<text x="{width - _RIGHT + 6}" y="{top + 16}" fill="#555555">{busy:.0f} % busy</text>'


def _joined(row: list[_Bar], thin: float) -> Iterable[_Bar]:
    """The bars, neighbours of one name and status joined where they are thinner than `thin` and as close."""
    waiting: _Bar | None = None
    for bar in row:
        if (
            waiting is not None
            and (bar.name, bar.status) == (waiting.name, waiting.status)
            and bar.begin - waiting.end < thin
            and bar.end - bar.begin < thin
            and (waiting.calls > 1 or waiting.end - waiting.begin < thin)
        ):
            end = max(waiting.end, bar.end)
            waiting = waiting._replace(end=end, calls=waiting.calls + 1, busy=waiting.busy + bar.busy)
            continue
        if waiting is not None:
            yield waiting
        waiting = bar
    if waiting is not None:
        yield waiting


def _covered(row: list[_Bar]) -> float:
    """Microseconds in which at least one of these calls ran."""
    covered, until = 0.0, 0.0
    for bar in row:
        covered += max(0.0, bar.end - max(bar.begin, until))
        until = max(until, bar.end)
    return covered


def _tooltip(bar: _Bar) -> str:
    if bar.calls > 1:
        text = f"{bar.calls} calls of {bar.name}: {duration(bar.busy)} in all, {duration(bar.busy / bar.calls)} each"
    else:
        text = f"{bar.name}: {duration(bar.end - bar.begin)}"
    if bar.detail:
        text += f" ({bar.detail})"
    text += f"\nfrom {duration(bar.begin)}"
    note = "died with its worker" if bar.status == "died" else _STATUSES.get(bar.status, bar.status)
    return f"{text}\n{note}" if note else text


def duration(microseconds: float) -> str:
    """A time as people read it: `12.3 ms`."""
    for limit, unit in ((1e3, "µs"), (1e6, "ms")):
        if microseconds < limit * 0.9995:
            return f"{microseconds * 1e3 / limit:.3g} {unit}"
    return f"{microseconds / 1e6:.4g} s"


def _axis(end: float, scale: float, bottom: int, width: int) -> Iterable[str]:
    step = 10 ** math.floor(math.log10(end / 5))
    step = next(step * factor for factor in (1, 2, 5, 10) if end / (step * factor) <= 10)
    for index in range(int(end / step) + 1):
        x = _LEFT + index * step * scale
        yield f'<line x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>'
        label = duration(index * step) if index else "0"
        yield f'<text x="{x:.1f}" y="{_TOP - 12}" text-anchor="middle" fill="#555555">{label}</text>'
    yield f'<line x1="{_LEFT}" y1="{bottom}" x2="{width - _RIGHT}" y2="{bottom}" stroke="#888888"/>'


def _legend(
    order: list[str], totals: dict[str, list[float]], colours: dict[str, str], top: int, width: int
) -> tuple[list[str], int]:
    parts = []
    x, y = _LEFT, top
    for name in order:
        count, busy = totals[name]
        text = f"{name if len(name) <= 60 else name[:57] + '...'}: {count:,.0f} calls, {duration(busy)}"
        wide = 26 + 7 * len(text)  # what a sans-serif font of 12 pixels needs at most
        if x > _LEFT and x + wide > width - 10:
            x, y = _LEFT, y + 20
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{escape(text)}</text>')
        x += wide
    return parts, y + 16


__all__ = ["plot_trace"]

"""Two SVG pictures without a plotting library: bars of the main figures, and the scaling curves."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from compat.benchmarks.runner import Cell

PANELS = [
    ("W1", "ms", "start to stop, ms"),
    ("W2", "us", "lonely call, us"),
    ("W3", "per_s", "submits, tasks/s (more is better)"),
    ("W3", "cpu_us", "CPU per task, us"),
    ("W4", "chunk1_per_s", "map, chunksize 1, items/s (more is better)"),
    ("W5", "both_ms", "80 MB both ways, ms"),
    ("W6", "s", "function that holds 80 MB, s"),
    ("W7", "cpu_map", "uneven tasks, share of the ideal (more is better)"),
    ("W8", "bytes_per_pending", "bytes per pending task"),
    ("W9", "ready_ms", "32 workers ready, ms"),
]
COLOURS = ["#0b6fa4", "#d1495b", "#66a182", "#edae49", "#7b5ea7", "#00798c", "#8d99ae", "#4a4e69", "#b56576", "#6d6875"]
STYLE = "<style>text{font:11px sans-serif;fill:#222}.title{font-weight:bold}</style>"


def text(x: float, y: float, value: str, extra: str = "") -> str:
    """One piece of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{escape(value)}</text>'


def document(width: int, height: int, body: list[str]) -> str:
    """A whole SVG file on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, STYLE, '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>"]) + "\n"


def bars(cells: list[Cell]) -> str:
    """One small bar chart per main figure, on a logarithmic axis (peers differ by factors of a thousand)."""
    body, y = [], 20.0
    for workload, figure, title in PANELS:
        found = [(cell.peer, cell.median(figure)) for cell in cells if cell.workload == workload]
        values = sorted((value, peer) for peer, value in found if value is not None and value > 0)
        if not values:
            continue
        body.append(text(10, y, f"{workload}: {title}", 'class="title"'))
        low, high = math.log10(values[0][0]) - 0.3, math.log10(values[-1][0])
        for value, peer in values:
            y += 16
            length = 4 + 380 * (math.log10(value) - low) / max(high - low, 0.3)
            colour = COLOURS[0] if peer.startswith("distpool") else "#b8c4cc"
            body.append(text(110, y, peer, 'text-anchor="end"'))
            body.append(f'<rect x="116" y="{y - 10:.1f}" width="{length:.1f}" height="12" fill="{colour}"/>')
            body.append(text(122 + length, y, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"))
        y += 30
    return document(620, int(y), body)


def curves(cells: list[Cell]) -> str:
    """Every curve that was measured (scaling, task length, threads), one panel each; empty if there is none."""
    panels: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for cell in cells:
        for name, value in (cell.answers[-1] if cell.answers else {}).items():
            if isinstance(value, dict):
                panels.setdefault((cell.workload, name), {})[cell.peer] = value
    body: list[str] = []
    for index, ((workload, name), lines) in enumerate(panels.items()):
        body += panel(20 + 380 * (index % 2), 30 + 270 * (index // 2), f"{workload}: {name.replace('_', ' ')}", lines)
    return document(790, 30 + 270 * ((len(panels) + 1) // 2), body) if panels else ""


def panel(left: float, top: float, title: str, lines: dict[str, dict[str, float]]) -> list[str]:
    """One log-log panel with a line per peer."""
    points = [(float(x), float(y)) for line in lines.values() for x, y in line.items() if y and y > 0]
    if not points:
        return []
    xs, ys = [math.log10(x) for x, _ in points], [math.log10(y) for _, y in points]
    x_low, x_span = min(xs), max(max(xs) - min(xs), 1e-9)
    y_low, y_span = min(ys), max(max(ys) - min(ys), 0.3)

    def place(x: Any, y: Any) -> tuple[float, float]:
        return left + 45 + 220 * (math.log10(float(x)) - x_low) / x_span, top + 200 - 180 * (
            math.log10(float(y)) - y_low
        ) / y_span

    body = [text(left, top, title, 'class="title"')]
    body.append(f'<rect x="{left + 45}" y="{top + 20}" width="220" height="180" fill="none" stroke="#999"/>')
    for value in sorted({x for x, _ in points}):
        body.append(text(place(value, 10**y_low)[0], top + 214, f"{value:g}", 'text-anchor="middle"'))
    for value in (10**y_low, 10 ** (y_low + y_span)):
        body.append(text(left + 42, place(10**x_low, value)[1] + 4, f"{value:.3g}", 'text-anchor="end"'))
    for index, (peer, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line.items() if y and y > 0)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body.append(f'<rect x="{left + 275}" y="{top + 22 + 16 * index}" width="10" height="10" fill="{colour}"/>')
        body.append(text(left + 289, top + 31 + 16 * index, peer))
    return body

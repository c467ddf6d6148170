"""Curves of a run as a picture (SVG): divergence, cross-entropy, and the loads of the busiest and the idlest expert."""

from __future__ import annotations

from collections.abc import Sequence

from training.distill import Report

WIDTH, HEIGHT, MARGIN = 640, 240, 46
_PANELS = (
    ("nats a token", (("divergence", "#1f77b4"), ("cross_entropy", "#d62728"))),
    ("load, in even shares", (("smallest_load", "#2ca02c"), ("largest_load", "#9467bd"))),
)


def draw_curves(reports: Sequence[Report]) -> str:
    """The text of an SVG file, one panel above the other; empty axes where nothing was reported yet."""
    panels = "".join(_panel(reports, number, *panel) for number, panel in enumerate(_PANELS))
    height = HEIGHT * len(_PANELS)
    style = "font-family:sans-serif;font-size:12px;background:white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" style="{style}">{panels}</svg>\n'


def _panel(reports: Sequence[Report], number: int, title: str, lines: Sequence[tuple[str, str]]) -> str:
    top, bottom = number * HEIGHT + MARGIN // 2, (number + 1) * HEIGHT - MARGIN // 2
    values = [getattr(report, name) for report in reports for name, _ in lines]
    highest, last = max(values, default=1.0) or 1.0, max((report.step for report in reports), default=1)
    parts = [
        f'<path d="M{MARGIN},{top}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<text x="{MARGIN + 4}" y="{top}">{title}</text>',
        f'<text x="2" y="{top + 10}">{highest:.2f}</text><text x="2" y="{bottom}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{bottom + 14}">{last}</text>',
    ]
    for place, (name, colour) in enumerate(lines):
        points = " ".join(
            f"{MARGIN + (WIDTH - 2 * MARGIN) * report.step / last:.1f},"
            f"{bottom - (bottom - top) * getattr(report, name) / highest:.1f}"
            for report in reports
        )
        label = name.replace("_", " ")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        parts.append(f'<text x="{WIDTH - 150}" y="{top + 14 * place}" fill="{colour}">{label}</text>')
    return "".join(parts)

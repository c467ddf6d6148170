"""The dashboards' vocabulary: queries, panels and rows, and the JSON that Grafana reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, STAT_WIDTH, STAT_HEIGHT, GRAPH_HEIGHT = 24, 3, 4, 8
SCHEMA_VERSION = 39
LINK = {
    "type": "dashboards",
    "title": "Consilium",
    "tags": ["consilium"],
    "asDropdown": False,
    "icon": "dashboard",
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "tooltip": "",
    "url": "",
}

MODEL = 'model_name=~"$model"'
GROUP = f'{MODEL}, group=~"$group"'

Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One expression; ``legend`` may hold labels in double braces."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A panel of kind timeseries, stat or bargauge; ``width`` is in twenty-fourths."""

    title: str
    about: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    maximum: float | None = None
    warn: float | None = None  # where the colour turns from green to red


@dataclass(frozen=True)
class Row:
    """Panels under one heading, placed from left to right."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, selector: str) -> str:
    return f"rate({metric}{{{selector}}}[$__rate_interval])"


def total(metric: str, selector: str, by: str = "") -> str:
    """The rate of a counter, summed."""
    return f"sum{f' by ({by})' if by else ''} ({rate(metric, selector)})"


def quantiles(histogram: str, selector: str, *wanted: float, by: str = "") -> list[Query]:
    """Quantiles of a histogram; ``by`` is one more label to tell apart."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    buckets = f"sum by ({labels}) ({rate(f'{histogram}_bucket', selector)})"
    return [Query(f"histogram_quantile({each}, {buckets})", f"p{each * 100:.0f}{legend}") for each in wanted]


def stat(title: str, about: str, expr: str, unit: str = "short", warn: float | None = None, legend: str = "") -> Panel:
    return Panel(title, about, [Query(expr, legend)], unit, kind="stat", width=STAT_WIDTH, warn=warn)


def build_panel(panel: Panel, number: int, x: int, y: int) -> Json:
    """The JSON of one panel."""
    steps: list[Json] = [{"color": "green", "value": None}]
    if panel.warn is not None:
        steps.append({"color": "red", "value": panel.warn})
    defaults: Json = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    defaults["color"] = {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"drawStyle": "line", "fillOpacity": 10, "showPoints": "never", "stacking": stacking}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": DATASOURCE,
        "gridPos": {"h": _height(panel), "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
            for place, query in enumerate(panel.queries)
        ],
    }


def _height(panel: Panel) -> int:
    return STAT_HEIGHT if panel.kind == "stat" and panel.width == STAT_WIDTH else GRAPH_HEIGHT


def _options(panel: Panel) -> Json:
    if panel.kind == "timeseries":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    reduce: Json = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    if panel.kind == "bargauge":
        return {**reduce, "orientation": "vertical", "displayMode": "basic", "showUnfilled": True}
    named = bool(panel.queries[0].legend)
    return {**reduce, "colorMode": "value", "graphMode": "area", "textMode": "value_and_name" if named else "value"}


def build_rows(rows: Sequence[Row]) -> list[Json]:
    """All panels, each row's heading above its own."""
    built: list[Json] = []
    y = 0
    for row in rows:
        heading = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        row_panel = {"type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": heading}
        built.append({"id": len(built) + 1, **row_panel})
        x, y, height = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            built.append(build_panel(panel, len(built) + 1, x, y))
            x, height = x + panel.width, max(height, _height(panel))
        y += height
    return built


def build_dashboard(uid: str, title: str, rows: Sequence[Row], variables: Sequence[Json]) -> Json:
    """The JSON of one dashboard."""
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["consilium"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [LINK],
        "templating": {"list": [datasource, *variables]},
        "panels": build_rows(rows),
    }


def build_variable(name: str, label: str, query: str) -> Json:
    """A choice of one or more values of a metric's label, all of them at first."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }

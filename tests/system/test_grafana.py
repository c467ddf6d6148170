"""The dashboards are what their code says, and what Grafana's own types allow."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.__main__ import FOLDER, build_all
from deploy.grafana.panels import COLUMNS

TYPES = Path(__file__).with_name("grafana_types.ts")
MODULES = Path(__file__).parents[2] / "build" / "grafana" / "node_modules"  # from scripts/system-setup.sh
OPTIONS = {
    "strict": True,
    "noEmit": True,
    "skipLibCheck": True,
    "module": "esnext",
    "moduleResolution": "bundler",
    "target": "es2022",
    "types": [],
}

DASHBOARDS = sorted(build_all())
Plant = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_what_is_committed_is_what_the_code_builds(name: str) -> None:
    assert (FOLDER / name).read_text("utf-8") == build_all()[name], "run python -m deploy.grafana"
    assert sorted(file.name for file in FOLDER.iterdir()) == DASHBOARDS


def test_the_types_are_grafanas(tmp_path: Path) -> None:
    found = compile_dashboards(tmp_path, [(FOLDER / name).read_text("utf-8") for name in DASHBOARDS])
    assert found.returncode == 0, found.stdout + found.stderr


def first(dashboard: dict[str, Any], kind: str) -> dict[str, Any]:
    panel: dict[str, Any] = next(each for each in dashboard["panels"] if each["type"] == kind)
    return panel


PLANTED: dict[str, Plant] = {
    "a misspelt key of the dashboard": lambda dashboard: dashboard.update(refersh="5s"),
    "a sync mode that is none": lambda dashboard: dashboard.update(graphTooltip=7),
    "a panel of no kind we know": lambda dashboard: first(dashboard, "stat").update(type="singlestat"),
    "a misspelt key of a panel": lambda dashboard: first(dashboard, "stat").update(titel="x"),
    "a place without a height": lambda dashboard: first(dashboard, "timeseries")["gridPos"].pop("h"),
    "a legend mode that is none": lambda dashboard: first(dashboard, "timeseries")["options"]["legend"].update(
        displayMode="lists"
    ),
    "an option of another kind": lambda dashboard: first(dashboard, "timeseries")["options"].update(textMode="value"),
    "a text mode that is none": lambda dashboard: first(dashboard, "stat")["options"].update(textMode="values"),
    "a line style that is none": lambda dashboard: first(dashboard, "timeseries")["fieldConfig"]["defaults"][
        "custom"
    ].update(drawStyle="lines"),
    "a target without an expression": lambda dashboard: first(dashboard, "stat")["targets"][0].pop("expr"),
    "a variable that sorts in no known way": lambda dashboard: dashboard["templating"]["list"][1].update(sort=44),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error: str, tmp_path: Path) -> None:
    dashboard = json.loads((FOLDER / "overview.json").read_text("utf-8"))
    PLANTED[error](dashboard)
    assert compile_dashboards(tmp_path, [json.dumps(dashboard)]).returncode != 0


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_ids_of_their_own_and_do_not_overlap(name: str) -> None:
    panels = json.loads((FOLDER / name).read_text("utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


def compile_dashboards(folder: Path, texts: list[str]) -> subprocess.CompletedProcess[str]:
    """What the TypeScript compiler says of dashboards, written as literals so that unknown keys are errors."""
    (folder / "node_modules").symlink_to(MODULES)
    (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS, "files": ["dashboards.ts"]}))
    literals = [f"({text}) satisfies DashboardJson;" for text in texts]
    (folder / "dashboards.ts").write_text("\n".join([TYPES.read_text("utf-8"), *literals]))
    return subprocess.run([MODULES / ".bin" / "tsc", "-p", folder], capture_output=True, text=True, timeout=120)

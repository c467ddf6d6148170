"""`python -m deploy.grafana` writes the dashboards; with --check it only says whether they are current."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.grafana.experts import EXPERTS
from deploy.grafana.overview import OVERVIEW
from deploy.grafana.panels import MODEL, build_dashboard, build_variable

FOLDER = Path(__file__).parent / "dashboards"


def build_all() -> dict[str, str]:
    """The text of every dashboard by its file's name."""
    model = build_variable("model", "Model", "label_values(consilium_build_info, model_name)")
    group = build_variable("group", "Group", f"label_values(consilium_worker_connected{{{MODEL}}}, group)")
    dashboards = {
        "overview.json": build_dashboard("consilium-overview", "Consilium / Overview", OVERVIEW, [model]),
        "experts.json": build_dashboard("consilium-experts", "Consilium / Experts", EXPERTS, [model, group]),
    }
    return {name: json.dumps(content, indent=2) + "\n" for name, content in dashboards.items()}


def main(arguments: Sequence[str]) -> int:
    """Write the files; with --check 1 where one of them is not what would be written."""
    stale = [name for name, text in build_all().items() if not _is_current(FOLDER / name, text)]
    if "--check" in arguments:
        for name in stale:
            print(f"{FOLDER / name} is not current; run python -m deploy.grafana", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(build_all()[name], "utf-8")
    return 0


def _is_current(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text("utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What ARCHITECTURE.md says is tested has a test of that name."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_the_failure_table_names_exists() -> None:
    text = (TESTS.parent / "ARCHITECTURE.md").read_text("utf-8")
    _, _, section = text.partition("## When things go wrong")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (TESTS / file).read_text("utf-8"), re.MULTILINE), f"{file}::{test}"

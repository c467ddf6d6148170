from __future__ import annotations

import json
import logging
import re

import pytest

from consilium.telemetry import announce, setup_logging


@pytest.fixture(autouse=True)
def _restore_logging() -> object:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_a_line_says_when_how_grave_who_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("expert/100%s", "info")
    logging.getLogger("any").warning("%d experts", 3)
    logging.getLogger("any").debug("unseen")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} WARNING expert/100%s 3 experts\n", line)


def test_the_last_set_up_counts(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("first", "error")
    setup_logging("second", "debug")
    logging.getLogger("any").debug("seen")
    assert capsys.readouterr().err.count("second seen") == 1


def test_the_listening_line(capsys: pytest.CaptureFixture[str]) -> None:
    announce("grpc://127.0.0.1:43113")
    assert json.loads(capsys.readouterr().out) == {"event": "listening", "address": "grpc://127.0.0.1:43113"}

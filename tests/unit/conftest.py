"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny_tokenizer import save_tokenizer

# The first example may have to wait until a kernel is compiled.
settings.register_profile("consilium", deadline=None)
settings.load_profile("consilium")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer of 384 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 384)
    return folder


@pytest.fixture
def anyio_backend() -> str:
    """What runs the tests marked `anyio`."""
    return "asyncio"

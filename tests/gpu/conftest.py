"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere, on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of kernels lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

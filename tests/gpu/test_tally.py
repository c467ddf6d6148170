"""Rows of experts, counted on the device."""

from __future__ import annotations

import numpy as np
import torch

from consilium.gpu.tally import Tally

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, EXPERTS, TOKENS, TOP_K = 3, 5, 700, 2  # more pairs than a program looks at together


def test_the_rows_of_live_tokens_are_counted_once_for_whoever_takes_them() -> None:
    ids = torch.randint(-1, EXPERTS + 1, (LAYERS, TOKENS, TOP_K), generator=torch.Generator().manual_seed(1))
    ids[1, :, :][ids[1] == 2] = -1  # nobody asks for this one
    tally, numbers = Tally(LAYERS, EXPERTS, DEVICE), ids.to(DEVICE, torch.int32)
    for steps in ((1, 600), (TOKENS,), (0,)):
        expected, asked = np.zeros((2, LAYERS, EXPERTS), np.int64)
        for live in steps:
            tally.add(numbers, torch.tensor([live], dtype=torch.int32, device=DEVICE))
            rows = np.stack([[(each[:live] == expert).sum() for expert in range(EXPERTS)] for each in ids.numpy()])
            expected, asked = expected + rows, asked + (rows > 0)
        rows, found = tally.take()
        assert np.array_equal(rows, expected)
        assert np.array_equal(found, asked)

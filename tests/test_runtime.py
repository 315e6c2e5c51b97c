"""common/runtime.py: generators."""

from pathlib import Path

import numpy as np
import torch

from common.runtime import Runtime, make_generator

REPO = Path(__file__).resolve().parents[1]
CPU = Runtime(torch.device("cpu"))


def test_generators_are_reproducible_and_independent():
    # A shorter key is no prefix of a longer one, a large number no pair of small ones.
    keys = [(0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**32,), (2**62, 1), (1, 2**31)]
    draws = [torch.randn(4000, generator=make_generator(*key)) for key in keys]
    again = [torch.randn(4000, generator=make_generator(*key)) for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    correlation = np.corrcoef(torch.stack(draws)) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.08

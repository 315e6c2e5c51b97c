"""common/runtime.py: types of numbers, generators."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common import runtime
from common.runtime import Runtime, autocast_dtype, make_generator

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


@pytest.mark.parametrize(
    ("capability", "trains", "generates"),
    [
        ((7, 5), torch.float32, torch.float16),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_gpu_computes_in_bf16_only_where_it_has_it(monkeypatch, capability, trains, generates):
    device, types = torch.device("cuda:0"), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(device) == trains
    assert autocast_dtype(device, training=False) == generates
    monkeypatch.setattr(
        runtime.torch,
        "autocast",
        lambda kind, dtype, enabled: types.append(dtype if enabled else torch.float32),
    )
    for bf16 in (True, False):
        Runtime(device).autocast(bf16)
    assert types == [trains, torch.float32]


def test_a_cpu_generates_in_float32(monkeypatch):
    for fast, trains in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert autocast_dtype(CPU.device) == trains
        assert autocast_dtype(CPU.device, training=False) == torch.float32

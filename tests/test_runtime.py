"""common/runtime.py: types of numbers, generators, batches."""

from collections import Counter

import numpy as np
import pytest
import torch

from common import UserError, runtime
from common.runtime import (
    Runtime,
    autocast_dtype,
    halved,
    in_batches,
    make_generator,
    of_equal_size,
)
from tests.tiny import CPU


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


# ---- batches ------------------------------------------------------------------------------------


def test_images_of_equal_size_and_type_go_together():
    images = [(torch.zeros(3, 8, size), i) for i, size in enumerate([8, 16, 24] * 16)]
    images.append((torch.zeros(3, 8, 8).byte(), 48))
    batches = list(of_equal_size(images, 4 * 8 * 16))
    assert all(len({(image.shape, image.dtype) for image, _ in batch}) == 1 for batch in batches)
    assert Counter(map(len, batches)) == {8: 2, 4: 4, 3: 5, 1: 2}
    assert sorted(i for batch in batches for _, i in batch) == list(range(49))  # none is lost


class SmallMemory:
    """Adds 1 to numbers, at most `most` at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.batches = most, []

    def __call__(self, batch: list) -> list:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. And so on.")
        self.batches.append(len(batch))
        return [value + 1 for _, value in batch]


def test_a_batch_that_is_too_large_for_a_gpu_is_halved():
    work, load = SmallMemory(3), lambda i: (torch.zeros(3, 8, 8), i) if i != 2 else None
    made = in_batches(load, work, range(11), torch.device("cuda:0"))
    assert [value for values in made for value in values] == [1, 2, *range(4, 12)]
    assert work.batches == [2, 3, 2, 3]


def test_too_little_memory_for_one_image_is_one_sentence():
    with pytest.raises(UserError, match=r"one image \(CUDA out of memory\): .*--device cpu"):
        halved(SmallMemory(0), [(None, 1), (None, 2)])

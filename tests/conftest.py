"""Fixtures for all tests: one thread, and the folder of real photos where there is one."""

import os
from pathlib import Path

import pytest
import torch

# The images are small: beside another busy process, threads that wait for each other take 10x.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real photos (REALDGEN_SHARED, else ../shared); the test is skipped without it."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("REALDGEN_SHARED", beside))
    if not (folder / "photos").is_dir():
        pytest.skip(f"no real photos in {folder} (set REALDGEN_SHARED)")
    return folder


@pytest.fixture
def no_metric_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS, DISTS, FID and the like have no weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))

"""data/pack.py: what lands in the packed file, and that training reads crops from it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import common
from data import pack

REPO = Path(__file__).resolve().parents[1]
CPU = common.Runtime(torch.device("cpu"))


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Blocks of 4 x 4 pixels of random colours, as an image (3, H, W)."""
    cells = torch.rand(3, height // 4 + 1, width // 4 + 1, generator=common.generator(seed))
    return cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three drawn photos, 2 x 2, 2 x 3 and 1 x 1 crops of 32 pixels."""
    for name, (height, width) in {"a": (67, 70), "b": (64, 99), "c": (32, 32)}.items():
        common.save_image(tmp_path / "photos" / f"{name}.png", noise(height, width, ord(name)))
    return tmp_path / "photos"


def packed(folder: Path, *photos: Path, **flags) -> np.ndarray:
    """The array that pack.py writes for these photos."""
    out = folder / f"x{len(list(folder.iterdir()))}.npy"  # open_pack keeps the files it has read
    names = tuple(map(str, photos))
    pack.main(pack.Config(names, str(out), **({"size": 32} | flags)), CPU)
    return np.load(out)


def places(crop: Tensor, photo: Tensor) -> list[list[int]]:
    """Where in a photo in [0, 1] a uint8 crop occurs, as [top, left]."""
    photo, size = common.to_uint8(photo), crop.shape[1]
    corner = photo[:, : photo.shape[1] - size + 1, : photo.shape[2] - size + 1]
    alike = (corner == crop[:, :1, :1]).all(0).nonzero().tolist()
    return [[y, x] for y, x in alike if torch.equal(photo[:, y : y + size, x : x + size], crop)]


# ---- the file ---------------------------------------------------------------------------------


def test_crops_are_native_pixels_side_by_side(photos, tmp_path):
    crops = torch.from_numpy(packed(tmp_path, photos))
    assert crops.dtype == torch.uint8 and crops.shape == (4 + 6 + 1, 3, 32, 32)
    a, b, c = (common.load_image(photos / f"{name}.png") for name in "abc")
    # What does not fill a crop is left at the edges, the same amount at each.
    assert [places(crop, a) for crop in crops[:4]] == [[[y, x]] for y in (1, 33) for x in (3, 35)]
    assert [places(crop, b) for crop in crops[4:10]] == [
        [[y, x]] for y in (0, 32) for x in (1, 33, 65)
    ]
    assert torch.equal(crops[10], common.to_uint8(c))


def test_real_photos_keep_their_pixels(shared, tmp_path):
    folder = next(f for f in sorted((shared / "photos" / "real_lr").iterdir()) if f.is_dir())
    files = sorted(folder.glob("*.jpg"))[:3]
    crops = torch.from_numpy(packed(tmp_path, *files, size=96, flat=0.0))
    whole = torch.stack([common.load_image(file) for file in files])
    assert len(crops) == sum((p.shape[1] // 96) * (p.shape[2] // 96) for p in whole)
    assert all(any(places(crop, photo) for photo in whole) for crop in crops)
    assert len(packed(tmp_path, *files, size=96)) >= 0.8 * len(crops)


def test_detail_is_the_step_between_blocks():
    blocks = torch.tensor([[10, 40], [10, 100]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    crop = blocks.expand(1, 3, 8, 8).to(torch.uint8)
    expected = ((30**2 + 90**2 + 0**2 + 60**2) / 4) ** 0.5
    assert pack.detail(crop).item() == pytest.approx(expected)


def test_flat_crops_are_left_out_and_counted(tmp_path, capsys):
    x = torch.linspace(0.3, 0.4, 64).expand(3, 64, 64)
    noisy = x + 3 / 255 * torch.randn(3, 64, 64, generator=common.generator(1))
    sky = torch.cat([x, noisy, torch.zeros(3, 64, 64), noise(64, 64)], dim=2)
    common.save_image(tmp_path / "photos" / "sky.png", sky)
    kept = torch.from_numpy(packed(tmp_path, tmp_path / "photos", size=64))
    assert "left out 3 flat crops" in capsys.readouterr().out
    assert torch.equal(kept, common.to_uint8(noise(64, 64))[None])
    assert len(packed(tmp_path, tmp_path / "photos", size=64, flat=0.0)) == 4


def test_bad_and_small_photos_are_named_once_and_counted(photos, tmp_path, capsys):
    whole = packed(tmp_path, photos)
    (photos / "bad.png").write_text("not an image")
    data = (photos / "b.png").read_bytes()
    (photos / "cut.png").write_bytes(data[: len(data) // 2])
    common.save_image(photos / "tiny.png", noise(31, 200))
    capsys.readouterr()
    np.testing.assert_array_equal(packed(tmp_path, photos), whole)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 4 and lines[-1].endswith("left out 0 flat crops and 3 photos of 6")
    for line, name in zip(lines, ("bad.png", "cut.png", "tiny.png"), strict=False):
        assert line.startswith("skipped: ") and name in line


def test_the_same_photos_give_the_same_bytes(photos, tmp_path):
    threads = torch.get_num_threads()
    for name, count in (("1.npy", 1), ("2.npy", 4)):
        torch.set_num_threads(count)
        pack.main(pack.Config((str(photos),), str(tmp_path / name), 32, per_photo=2), CPU)
    torch.set_num_threads(threads)
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()


def test_per_photo_draws_some_of_the_crops_of_each(photos, tmp_path):
    whole = packed(tmp_path, photos)
    rows = [
        (whole == crop).all((1, 2, 3)).argmax() for crop in packed(tmp_path, photos, per_photo=2)
    ]
    assert rows == sorted(set(rows)) and [sum(r in part for r in rows) for part in
        (range(4), range(4, 10), range(10, 11))] == [2, 2, 1]  # fmt: skip
    drawn = {packed(tmp_path, photos, per_photo=1, seed=seed).tobytes() for seed in range(6)}
    assert len(drawn) > 1


class FullDisk:
    """A file on a disk with no room for a second crop."""

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        if self.file.tell() > 3 * 32 * 32:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def test_a_full_disk_leaves_the_old_file_and_no_other(photos, tmp_path, monkeypatch):
    cfg = pack.Config((str(photos),), str(tmp_path / "out" / "x.npy"), 32)
    monkeypatch.setattr(pack, "open", lambda *a: FullDisk(open(*a)), raising=False)
    for old in (None, b"old"):
        if old:
            (tmp_path / "out" / "x.npy").write_bytes(old)
        with pytest.raises(OSError, match="No space left"):
            pack.main(cfg, CPU)
        assert [p.read_bytes() for p in (tmp_path / "out").iterdir()] == ([old] if old else [])


# ---- the command line -------------------------------------------------------------------------


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "data" / "pack.py"), *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_works_from_another_folder(photos, tmp_path):
    (tmp_path / "data").mkdir()
    photos.rename(tmp_path / "data" / "lr")
    done = run("--size", 32, cwd=tmp_path)
    assert done.returncode == 0 and "11 crops of 32 x 32 pixels in data/lr.npy" in done.stdout
    assert np.load(tmp_path / "data" / "lr.npy").shape == (11, 3, 32, 32)


def test_the_file_is_called_as_the_first_folder_of_photos(photos, tmp_path):
    """So that packed HR photos do not become the LR photos of stage 2."""
    photos.rename(tmp_path / "hr")
    assert run("--photos", "hr/", "--size", 32, cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hr", "hr.npy"]


@pytest.mark.parametrize(
    "flags",
    [
        "--photos nowhere",
        "--out x.png",
        "--size 7",
        "--flat -1",
        "--per-photo -1",
        "--flat 300",
        "--size 640",
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(flags, photos, tmp_path):
    done = run("--photos", photos, "--out", "x.npy", *flags.split(), cwd=tmp_path)
    message = done.stderr.strip().splitlines()[-1]  # after the progress bar
    assert done.returncode == 2 and "error: " in message and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


# ---- training on it ---------------------------------------------------------------------------


def crops_of(files: list[Path], size: int = 16, rank: int = 0) -> common.PhotoCrops:
    return common.PhotoCrops(files, size, 4, 0, common.Runtime(CPU.device, rank))


def found_in(crop: Tensor, photo: Tensor) -> bool:
    """Whether a crop in [0, 1], flipped or not, occurs in a photo."""
    crop = common.to_uint8(crop)
    return bool(places(crop, photo) or places(crop.flip(2), photo))


def test_training_crops_occur_in_the_photos(photos, tmp_path):
    packed(tmp_path, photos)
    whole = [common.load_image(photos / f"{name}.png") for name in "abc"]
    data = crops_of([tmp_path / "x1.npy"])
    hits = [[found_in(data[i], photo) for photo in whole] for i in range(40)]
    assert all(map(any, hits)) and all(map(any, zip(*hits, strict=True)))
    assert not data.cache, "a packed row is kept in memory a second time"


def test_a_packed_crop_depends_on_its_number_alone(photos, tmp_path):
    packed(tmp_path, photos)
    file = tmp_path / "x1.npy"
    first, again = crops_of([file]), crops_of([file], rank=1)
    for i in (7, 0, 10**9):
        assert torch.equal(first[i], again[i]) and not torch.equal(first[i], first[i + 1])
    two, rest = list(first.batches([0, 1], CPU.device)), list(again.batches([1], CPU.device))
    assert torch.equal(two[1], rest[0]) and two[0].shape == (4, 3, 16, 16)


def test_packed_files_and_photos_mix(photos, tmp_path):
    for name in "ab":
        packed(tmp_path, photos / f"{name}.png")
    listed = common.list_images([str(photos / "c.png"), str(tmp_path / "x1.npy")], "--lr", True)
    data = crops_of([*listed, tmp_path / "x2.npy"])
    assert data.count == 4 + 6 + 1
    whole = [common.load_image(photos / f"{name}.png") for name in "abc"]
    hits = torch.tensor([[found_in(data[i], photo) for photo in whole] for i in range(110)]).sum(0)
    assert hits.sum() == 110  # binomial: 40, 60 and 10 expected
    assert (hits - torch.tensor([40, 60, 10])).abs().max() < 20 and hits.min() > 0


def test_workers_started_afresh_open_the_file_themselves(photos, tmp_path):
    packed(tmp_path, photos)
    data = crops_of([tmp_path / "x1.npy"])
    expected = torch.stack([data[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(
        data, 4, sampler=range(4), num_workers=1, multiprocessing_context="spawn"
    )
    assert torch.equal(next(iter(loader)), expected)


@pytest.mark.parametrize(
    "content",
    [np.zeros((2, 3, 32, 32), np.float32), np.zeros((2, 32, 32, 3), np.uint8),
     np.zeros((3, 32, 32), np.uint8), np.zeros((0, 3, 32, 32), np.uint8),
     np.zeros((2, 3, 15, 32), np.uint8), np.array([{}]), b"", b"not an array", "half"],
    ids=["float", "channels last", "one", "none", "small", "objects", "empty", "text", "half"],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence_that_names_it(content, tmp_path):
    path = tmp_path / "wrong.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.zeros((2, 3, 32, 32), np.uint8) if isinstance(content, str) else content)
    if isinstance(content, str):
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(common.UserError, match="wrong.npy") as error:
        crops_of([path])
    assert "\n" not in str(error.value)


def test_only_training_takes_packed_files(photos, tmp_path):
    packed(tmp_path, photos)
    given = [str(tmp_path / "x1.npy")]
    assert common.find_photos(given, "lr", "--lr", packed=True) == [tmp_path / "x1.npy"]
    with pytest.raises(common.UserError, match="--lr .*x1.npy: packed crops are only to train on"):
        common.find_photos(given, "lr", "--lr")


def test_a_packed_file_in_data_comes_before_the_folder(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    (tmp_path / "data").mkdir()
    photos.rename(tmp_path / "data" / "lr")
    folder = sorted((tmp_path / "data" / "lr").iterdir())
    assert common.find_photos((), "lr", "--lr", packed=True) == folder
    packed(tmp_path / "data", tmp_path / "data" / "lr")
    (tmp_path / "data" / "x1.npy").rename(tmp_path / "data" / "lr.npy")
    capsys.readouterr()
    assert common.find_photos((), "lr", "--lr", packed=True) == [tmp_path / "data" / "lr.npy"]
    assert capsys.readouterr().out.count("data/lr.npy") == 1
    assert common.find_photos((), "lr", "--lr") == folder

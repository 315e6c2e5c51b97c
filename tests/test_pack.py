"""data/pack.py: the packed file, photos decoded once, and the random crops training reads."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import common
from data import pack
from data.pack import Crops, Photos

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
    out = folder / f"x{len(list(folder.iterdir()))}.npy"
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


# ---- photos, decoded once -----------------------------------------------------------------------


def uint8(file: Path) -> np.ndarray:
    """A photo as it is read without data/pack.py."""
    return common.to_uint8(common.load_image(file)).numpy()


def no_read(file: Path) -> np.ndarray:
    raise AssertionError(f"{file} is decoded a second time")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_photos_are_whole_and_left_on_the_disk(photos, tmp_path):
    files = sorted(photos.iterdir())
    decoded = Photos(files, tmp_path / "decoded", CPU)
    assert decoded.table[:, 2:].tolist() == [[3, 67, 70], [3, 64, 99], [3, 32, 32]]
    for i, file in enumerate(files):
        assert decoded[i].dtype == np.uint8
        np.testing.assert_array_equal(decoded[i], uint8(file))
    assert all(isinstance(pixels, np.memmap) for pixels in decoded.maps)
    size = 3 * (67 * 70 + 64 * 99 + 32 * 32)
    assert sum(file.stat().st_size for file in (tmp_path / "decoded").glob("*.pixels")) == size


def test_a_second_reader_decodes_nothing_and_gets_the_same_bytes(photos, tmp_path, capsys):
    (photos / "bad.png").write_text("not an image")
    files = sorted(photos.iterdir())
    first = Photos(files, tmp_path / "decoded", CPU)
    assert capsys.readouterr().out.count("skipped") == 1
    again = Photos(files, tmp_path / "decoded", CPU, no_read)
    np.testing.assert_array_equal(first.table, again.table)
    assert all((first[i] == again[i]).all() for i in range(3))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["pixels", "another", "fewer", "order"])
def test_photos_that_changed_are_decoded_anew_and_the_old_file_is_removed(photos, tmp_path, change):
    Image.fromarray(uint8(photos / "a.png").transpose(1, 2, 0)).save(photos / "0.bmp")
    files = sorted(photos.iterdir())
    Photos(files, tmp_path / "decoded", CPU)
    old = names(tmp_path / "decoded")
    if change == "pixels":  # of the same number of bytes: only its time tells
        Image.fromarray(255 - uint8(files[0]).transpose(1, 2, 0)).save(files[0])
        os.utime(files[0], ns=(0, files[0].stat().st_mtime_ns + 10**9))
    elif change == "another":
        common.save_image(photos / "d.png", noise(40, 40))
        files.append(photos / "d.png")
    else:
        files = files[1:] if change == "fewer" else files[::-1]
    decoded = Photos(files, tmp_path / "decoded", CPU)
    assert len(decoded.table) == len(files)
    for i, file in enumerate(files):
        np.testing.assert_array_equal(decoded[i], uint8(file))
    assert len(old) == 2 and len(names(tmp_path / "decoded")) == 2
    assert not old & names(tmp_path / "decoded")


def test_bad_photos_are_skipped_counted_and_said_in_one_line(photos, tmp_path, capsys):
    """Also a truncated one, whose header is whole; small ones are counted by the crops."""
    files = sorted(photos.iterdir())
    (tmp_path / "bad.png").write_text("not an image")
    Image.fromarray(uint8(files[0]).transpose(1, 2, 0)).save(tmp_path / "truncated.jpg")
    data = (tmp_path / "truncated.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    common.save_image(tmp_path / "tiny.png", noise(15, 99))
    bad = [tmp_path / "bad.png", tmp_path / "truncated.jpg"]
    mixed = [bad[0], files[0], bad[1], *files[1:], tmp_path / "tiny.png"]
    decoded = Photos(mixed, tmp_path / "decoded", CPU)
    message = capsys.readouterr().out
    assert message.count("\n") == 1
    assert "skipped 2 of 6 photos" in message and "bad.png" in message
    assert len(decoded.table) == 4
    crops = Crops(decoded, 16, 4, 0)
    assert crops.rows.tolist() == [0, 1, 2] and crops.left_out == 1
    for i, file in zip(crops.rows, files, strict=True):
        np.testing.assert_array_equal(decoded[i], uint8(file))
    assert crops.batch(0, 30).shape == (30, 3, 16, 16)


def test_without_a_readable_photo_there_is_one_sentence_and_no_file(tmp_path):
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(common.UserError, match="no photo can be read of 1 .*bad.png") as error:
        Photos([tmp_path / "bad.png"], tmp_path / "decoded", CPU)
    assert "\n" not in str(error.value)
    assert names(tmp_path / "decoded") == set()


@pytest.mark.parametrize("when", ["photo", "table", "pixels"])
def test_an_error_while_decoding_leaves_nothing_half_written(photos, tmp_path, monkeypatch, when):
    """An error in a photo, or between the two files, of which the table is renamed first."""
    files = sorted(photos.iterdir())

    def failing(file: Path) -> np.ndarray:
        if file == files[-1]:
            raise OSError(errno.EIO, "the disk is gone")
        return pack.read_photo(file)

    def replace(source: Path, target: Path) -> None:
        if target.suffix == {"table": ".npy", "pixels": ".pixels"}[when]:
            raise OSError(errno.EIO, "the disk is gone")
        source.rename(target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        if when != "photo":
            patch.setattr(common.os, "replace", replace)
        Photos(files, tmp_path / "decoded", CPU, failing if when == "photo" else pack.read_photo)
    left = names(tmp_path / "decoded")
    assert len(left) == (when == "pixels") and all(name.endswith(".npy") for name in left)
    decoded = Photos(files, tmp_path / "decoded", CPU)
    np.testing.assert_array_equal(decoded[2], uint8(files[2]))


KILLED = """
import sys, time, torch, common
from pathlib import Path
from data import pack

def read(file):
    if file.name == "c.png":
        print("decoding", flush=True)
        time.sleep(60)
    return pack.read_photo(file)

common.in_parallel = lambda work, items, threads: map(work, items)
files = sorted(Path(sys.argv[1]).iterdir())
pack.Photos(files, Path(sys.argv[2]), common.Runtime(torch.device("cpu")), read)
"""


def test_a_killed_decode_leaves_nothing_that_is_taken_for_whole(photos, tmp_path):
    command = [sys.executable, "-c", KILLED, photos, tmp_path / "decoded"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=env, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "decoding\n"
        process.send_signal(signal.SIGKILL)
    left = names(tmp_path / "decoded")
    assert left and all(name.startswith(".") and name.endswith(".tmp") for name in left)
    files = sorted(photos.iterdir())
    decoded = Photos(files, tmp_path / "decoded", CPU)
    for i, file in enumerate(files):
        np.testing.assert_array_equal(decoded[i], uint8(file))


READERS = """
import sys, common
from pathlib import Path
from data import pack

def read(file):
    print("decoding", flush=True)
    return pack.read_photo(file)

with common.runtime("cpu") as rt:
    decoded = pack.Photos(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), rt, read)
    crops = pack.Crops(decoded, 16, 4, 0)
    Path(f"batch{rt.rank}").write_bytes(crops.batch(7, 4).numpy().tobytes())
"""


def test_two_processes_get_equal_bytes_and_one_of_them_decodes(photos, tmp_path):
    (photos / "bad.png").write_text("not an image")
    (tmp_path / "readers.py").write_text(READERS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, tmp_path / "readers.py", photos, tmp_path / "decoded"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("decoding") == 4 and done.stdout.count("skipped 1 of 4") == 1
    assert (tmp_path / "batch0").read_bytes() == (tmp_path / "batch1").read_bytes()


# ---- random crops of them -----------------------------------------------------------------------


def crops_of(
    files: list[Path], folder: Path, seed: int = 0, stream: int = 0, rank: int = 0
) -> Crops:
    """Crops of 16 pixels in batches of 4, of photos that are decoded into folder/decoded."""
    photos = Photos(files, folder / "decoded", common.Runtime(CPU.device, rank))
    return Crops(photos, 16, 4, seed, stream)


def found_in(crop: Tensor, photo: Tensor) -> bool:
    """Whether a uint8 crop, flipped or not, occurs in a photo in [0, 1]."""
    return bool(places(crop, photo) or places(crop.flip(2), photo))


def test_a_crop_depends_on_seed_and_number_alone(photos, tmp_path):
    files = sorted(photos.iterdir())
    first, again, other_rank = (crops_of(files, tmp_path, rank=rank) for rank in (0, 0, 1))
    assert first.batch(5, 4).shape == (4, 3, 16, 16) and first.batch(5, 4).dtype == torch.uint8
    for i in (3, 0, 10**9):
        assert torch.equal(first.batch(i, 4), again.batch(i, 4))
        assert torch.equal(first.batch(i, 4), other_rank.batch(i, 4))
    sources = (first, crops_of(files, tmp_path, seed=1), crops_of(files, tmp_path, stream=1))
    drawn = [crops.batch(i, 4) for crops in sources for i in (0, 1)]
    assert len({batch.numpy().tobytes() for batch in drawn}) == 3 * 2
    assert all(len({crop.numpy().tobytes() for crop in batch}) > 1 for batch in drawn)


def test_nothing_draws_from_the_global_generator(photos, tmp_path):
    state = torch.get_rng_state()
    crops_of(sorted(photos.iterdir()), tmp_path).batch(0, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_crops_keep_to_the_blocks_of_jpeg(tmp_path):
    columns = torch.arange(50).expand(3, 41, 50) / 255
    rows = torch.arange(41)[:, None].expand(3, 41, 50) / 255
    for name, image in (("columns", columns), ("rows", rows)):
        common.save_image(tmp_path / name / "a.png", image)
        crops = Crops(
            Photos([tmp_path / name / "a.png"], tmp_path / f"{name}-decoded", CPU), 16, 4, 0
        )
        starts = set(crops.batch(0, 60).amin((1, 2, 3)).tolist())
        assert starts == ({0, 8, 16, 24, 32} if name == "columns" else {0, 8, 16, 24})


def test_crops_are_parts_of_all_photos_some_flipped(photos, tmp_path):
    files = sorted(photos.iterdir())
    found = set()
    for crop in crops_of(files, tmp_path).batch(0, 60):
        for flipped, view in enumerate((crop, crop.flip(2))):
            found |= {(n, flipped) for n, file in enumerate(files)
                      if places(view, common.load_image(file))}  # fmt: skip
    assert found == {(n, flipped) for n in range(3) for flipped in (0, 1)}


def test_batches_go_on_where_a_stopped_run_left_off(photos, tmp_path):
    crops = crops_of(sorted(photos.iterdir()), tmp_path)
    whole = list(crops.batches(range(4), 4, CPU.device))
    rest = list(crops.batches([2, 3], 4, CPU.device))
    assert len(whole) == 4 and whole[0].shape == (4, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    for i, batch in enumerate(whole):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, crops.batch(i, 4).float() / 255)


def test_a_crop_of_a_scale_has_as_many_times_more_pixels(photos, tmp_path):
    decoded = Photos(sorted(photos.iterdir()), tmp_path / "decoded", CPU)
    assert Crops(decoded, 16, 4, 0, scale=4).batch(0, 2).shape == (2, 3, 64, 64)


def test_photos_that_are_not_among_the_rows_are_not_drawn(photos, tmp_path):
    files = sorted(photos.iterdir())
    decoded = Photos(files, tmp_path / "decoded", CPU)
    crops = Crops(decoded, 16, 4, 0, rows=np.array([0, 2]))
    whole = [common.load_image(file) for file in files]
    hits = [[found_in(crop, photo) for photo in whole] for crop in crops.batch(0, 40)]
    assert np.sum(hits, axis=0)[1] == 0 and all(map(any, hits))


@pytest.mark.parametrize(
    ("flag", "crop", "scale", "rows", "works"),
    [
        ("--crop", 96, 1, [0, 1, 2], 64),
        ("--crop", 20, 4, [0, 1, 2], 16),
        ("--vq-crop", 33, 1, [2], 32),
    ],
)
def test_a_crop_too_large_is_one_sentence_that_names_the_largest_that_works(
    photos, tmp_path, flag, crop, scale, rows, works
):
    decoded = Photos(sorted(photos.iterdir()), tmp_path / "decoded", CPU)
    settings = {"scale": scale, "flag": flag, "rows": np.array(rows)}
    with pytest.raises(common.UserError) as error:
        Crops(decoded, crop, 4, 0, **settings)
    found = f"none of {len(rows)} photos has {scale * crop} x {scale * crop} pixels"
    assert str(error.value) == f"{flag} {crop}: {found}; {flag} {works} is the largest that works."
    assert len(Crops(decoded, works, 4, 0, **settings).rows) > 0
    with pytest.raises(common.UserError):  # the next multiple of 16
        Crops(decoded, works + 16, 4, 0, **settings)


def test_photos_too_small_for_any_crop_are_said_to_be_so(tmp_path):
    common.save_image(tmp_path / "tiny.png", noise(15, 99))
    np.save(tmp_path / "tiny.npy", np.zeros((2, 3, 15, 32), np.uint8))
    decoded = Photos([tmp_path / "tiny.png", tmp_path / "tiny.npy"], tmp_path / "decoded", CPU)
    with pytest.raises(common.UserError, match="none of 3 photos has 16 x 16 .*take larger ones"):
        Crops(decoded, 16, 4, 0)


# ---- training on packed files -------------------------------------------------------------------


def test_training_crops_occur_in_the_photos(photos, tmp_path):
    packed(tmp_path, photos)
    whole = [common.load_image(photos / f"{name}.png") for name in "abc"]
    crops = crops_of([tmp_path / "x1.npy"], tmp_path)
    hits = [[found_in(crop, photo) for photo in whole] for crop in crops.batch(0, 40)]
    assert all(map(any, hits)) and all(map(any, zip(*hits, strict=True)))
    assert all(isinstance(pixels, np.memmap) for pixels in crops.photos.maps)
    assert not (tmp_path / "decoded").exists(), "packed rows are written a second time"


def test_a_packed_crop_depends_on_its_number_alone(photos, tmp_path):
    packed(tmp_path, photos)
    first, again = (crops_of([tmp_path / "x1.npy"], tmp_path, rank=rank) for rank in (0, 1))
    for i in (7, 0, 10**9):
        assert torch.equal(first.batch(i, 4), again.batch(i, 4))
        assert not torch.equal(first.batch(i, 4), first.batch(i + 1, 4))
    two, rest = (list(c.batches(n, 4, CPU.device)) for c, n in ((first, [0, 1]), (again, [1])))
    assert torch.equal(two[1], rest[0]) and two[0].shape == (4, 3, 16, 16)


def test_packed_files_and_photos_mix(photos, tmp_path):
    for name in "ab":
        packed(tmp_path, photos / f"{name}.png")
    listed = common.list_images([str(photos / "c.png"), str(tmp_path / "x1.npy")], "--lr", True)
    crops = crops_of([*listed, tmp_path / "x2.npy"], tmp_path)
    assert len(crops.rows) == 4 + 6 + 1 and crops.left_out == 0
    whole = [common.load_image(photos / f"{name}.png") for name in "abc"]
    hits = [[found_in(crop, photo) for photo in whole] for crop in crops.batch(0, 110)]
    hits = torch.tensor(hits).sum(0)
    assert hits.sum() == 110  # binomial: 40, 60 and 10 expected
    assert (hits - torch.tensor([40, 60, 10])).abs().max() < 20 and hits.min() > 0


@pytest.mark.parametrize(
    "content",
    [np.zeros((2, 3, 32, 32), np.float32), np.zeros((2, 32, 32, 3), np.uint8),
     np.zeros((3, 32, 32), np.uint8), np.zeros((0, 3, 32, 32), np.uint8),
     np.array([{}]), b"", b"not an array", "half"],
    ids=["float", "channels last", "one", "none", "objects", "empty", "text", "half"],
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
        crops_of([path], tmp_path)
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

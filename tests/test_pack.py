"""common/photos.py and tools/pack.py: photos decoded once, random crops of them, packed files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common import UserError
from common.files import find_photos
from common.folder import RECORD
from common.images import load_image, save_image, to_uint8
from common.photos import Crops, Photos, dihedral, read_photo
from common.runtime import Runtime, make_generator
from tests.commands import FORKSERVER, assert_refused, run
from tests.tiny import CPU
from tools import pack


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Blocks of 4 x 4 pixels of random colours, as an image (3, H, W)."""
    cells = torch.rand(3, height // 4 + 1, width // 4 + 1, generator=make_generator(seed))
    return cells.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :height, :width]


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three drawn photos, 2 x 2, 2 x 3 and 1 x 1 crops of 32 pixels."""
    for name, (height, width) in {"a": (67, 70), "b": (64, 99), "c": (32, 32)}.items():
        save_image(tmp_path / "photos" / f"{name}.png", noise(height, width, ord(name)))
    return tmp_path / "photos"


@pytest.fixture
def files(photos) -> list[Path]:
    return sorted(photos.iterdir())


def packed(folder: Path, *photos: Path, **flags) -> np.ndarray:
    """The array that tools/pack.py writes for these photos."""
    out = folder / f"x{len(list(folder.glob('[!.]*')))}.npy"
    names = tuple(map(str, photos))
    pack.main(pack.Config(names, str(out), **({"size": 32} | flags)), CPU)
    return np.load(out)


def places(crop: Tensor, photo: Tensor) -> list[list[int]]:
    """Where in a photo in [0, 1] a uint8 crop occurs, as [top, left]."""
    photo, size = to_uint8(photo), crop.shape[1]
    corner = photo[:, : photo.shape[1] - size + 1, : photo.shape[2] - size + 1]
    alike = (corner == crop[:, :1, :1]).all(0).nonzero().tolist()
    return [[y, x] for y, x in alike if torch.equal(photo[:, y : y + size, x : x + size], crop)]


def hits(crops: Tensor, files: list[Path]) -> Tensor:
    """Whether each of the crops, turned in each of 8 ways, occurs in each photo: (8, N, photos)."""
    turned = [dihedral(crops, k) for k in range(8)]
    whole = [load_image(file) for file in files]
    return torch.tensor([[[bool(places(c, w)) for w in whole] for c in batch] for batch in turned])


def assert_equal_photos(decoded: Photos, files: list[Path]) -> None:
    assert len(decoded.table) == len(files)
    for i, file in enumerate(files):
        assert decoded[i].dtype == np.uint8
        np.testing.assert_array_equal(decoded[i], read_photo(file))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != RECORD}


# ---- photos, decoded once ---------------------------------------------------------------------


def test_photos_are_decoded_once_and_left_on_the_disk(photos, files, tmp_path, monkeypatch, capsys):
    """By the first process of a node, LOCAL_RANK 0 (two real ones: test_processes.py)."""

    def no_read(file: Path) -> np.ndarray:
        raise AssertionError(f"{file} is decoded a second time")

    bad = photos / "bad.png"
    bad.write_text("not an image")
    for read, local_rank in ((read_photo, 0), (no_read, 0), (no_read, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        decoded = Photos([bad, *files], tmp_path / "decoded", CPU, read)
        assert_equal_photos(decoded, files)
        assert all(isinstance(pixels, np.memmap) for pixels in decoded.maps)
    assert capsys.readouterr().out.count("skipped 1 of 4 photos") == 1


@pytest.mark.parametrize("change", ["pixels", "another", "fewer", "order"])
def test_photos_that_changed_are_decoded_anew_and_only_old_files_are_removed(
    files, tmp_path, change
):
    folder, mine = tmp_path / "decoded", {"mine.npy", "mine.tmp", "a.pixels"}
    Photos(files, folder, CPU)
    old = names(folder)
    for name in (*mine, ".realdgen-1-2.tmp"):
        (folder / name).touch()
    if change == "pixels":
        save_image(files[0], noise(40, 40))
        os.utime(files[0], ns=(0, files[0].stat().st_mtime_ns + 10**9))
    else:
        changed = {"another": [*files, files[0]], "fewer": files[1:], "order": files[::-1]}
        files = changed[change]
    assert_equal_photos(Photos(files, folder, CPU), files)
    new = names(folder) - mine
    assert mine < names(folder) and not old & new
    assert sorted(Path(name).suffix for name in new) == [".npy", ".pixels"]


def test_bad_photos_are_skipped_and_small_ones_left_out_of_the_crops(files, tmp_path, capsys):
    bad, tiny = tmp_path / "bad.png", tmp_path / "tiny.png"
    bad.write_bytes(files[0].read_bytes()[:500])  # its header is whole
    save_image(tiny, noise(15, 99))
    decoded = Photos([bad, *files, tiny], tmp_path / "decoded", CPU)
    message = capsys.readouterr().out
    assert message.count("\n") == 1 and "skipped 1 of 5 photos" in message and "bad.png" in message
    assert_equal_photos(decoded, [*files, tiny])
    crops = Crops(decoded, 16, 4, 0)
    assert crops.rows.tolist() == [0, 1, 2] and crops.left_out == 1
    with pytest.raises(UserError, match="no photo can be read of 1 .*bad.png"):
        Photos([bad], tmp_path / "none", CPU)
    assert names(tmp_path / "none") == set()


def decode_and_die(files: list[Path], folder: Path, when: str) -> None:
    """Decode photos in a process that is killed while it reads or renames the last file."""

    def read(file: Path) -> np.ndarray:
        if when == "reading" and file == files[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_photo(file)

    def replace(source: Path, target: Path) -> None:
        if target.suffix == ".pixels":  # the last of two files to be renamed
            os.kill(os.getpid(), signal.SIGKILL)
        source.rename(target)

    os.replace = replace
    Photos(files, folder, CPU, read)


@pytest.mark.parametrize("when", ["reading", "renaming"])
def test_a_killed_decode_leaves_nothing_that_is_taken_for_whole(files, tmp_path, when):
    folder = tmp_path / "decoded"
    # Not a fork of this process: torch's threads do not survive one.
    process = FORKSERVER.Process(target=decode_and_die, args=(files, folder, when))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and list(folder.glob(".*.tmp"))
    assert_equal_photos(Photos(files, folder, CPU), files)
    assert len(names(folder)) == 2


# ---- random crops of them ---------------------------------------------------------------------


@pytest.fixture
def source(files, tmp_path) -> list[Path]:
    """Two files of packed crops, 4 and 6, and between them a photo of one crop."""
    for file in files[:2]:
        packed(tmp_path, file)
    return [tmp_path / "x1.npy", files[2], tmp_path / "x2.npy"]


def crops_of(
    source: list[Path], folder: Path, seed: int = 0, stream: int = 0, rank: int = 0
) -> Crops:
    """Crops of 16 pixels, of photos that are decoded into folder/decoded."""
    photos = Photos(source, folder / "decoded", Runtime(CPU.device, rank))
    return Crops(photos, 16, 4, seed, stream)


def test_a_crop_depends_on_seed_stream_and_number_alone(source, tmp_path):
    state = torch.get_rng_state()
    first, again = (crops_of(source, tmp_path, rank=rank) for rank in (0, 1))
    for i in (3, 0, 10**9):
        assert torch.equal(first.batch(i, 4), again.batch(i, 4))
    sources = (first, crops_of(source, tmp_path, seed=1), crops_of(source, tmp_path, stream=1))
    drawn = [crops.batch(i, 4) for crops in sources for i in (0, 1)]
    assert len({batch.numpy().tobytes() for batch in drawn}) == 3 * 2
    assert all(len({crop.numpy().tobytes() for crop in batch}) > 1 for batch in drawn)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_go_on_where_a_stopped_run_left_off(source, tmp_path):
    crops = crops_of(source, tmp_path)
    whole = list(crops.batches(range(4), 4, CPU.device))
    rest = list(crops.batches([2, 3], 4, CPU.device))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    for i, batch in enumerate(whole):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch, crops.batch(i, 4).float() / 255)


def test_crops_are_parts_of_all_photos_and_packed_crops_turned_in_8_ways(source, files, tmp_path):
    crops = crops_of(source, tmp_path)
    assert len(crops.rows) == 4 + 6 + 1 and crops.left_out == 0
    drawn = crops.batch(0, 110)
    assert drawn.shape == (110, 3, 16, 16) and drawn.dtype == torch.uint8
    found = hits(drawn, files)
    assert found.any((1, 2)).all()
    count = found.any(0).sum(0)
    assert count.sum() == 110  # binomial: 40, 60 and 10 expected
    assert (count - torch.tensor([40, 60, 10])).abs().max() < 20 and count.min() > 0
    assert all(isinstance(pixels, np.memmap) for pixels in crops.photos.maps)


@pytest.mark.parametrize("scale", [1, 4])
def test_crops_are_turned_all_eight_ways_and_keep_to_the_blocks_of_jpeg(tmp_path, scale):
    size = 16 * scale
    y, x = torch.meshgrid(torch.arange(size + 25), torch.arange(size + 34), indexing="ij")
    image = torch.stack([y, x, 0 * x]).byte()
    save_image(tmp_path / "a.png", image / 255)
    photos, turns, corners = Photos([tmp_path / "a.png"], tmp_path / "decoded", CPU), set(), []
    for crop in Crops(photos, 16, 4, 0, scale=scale).batch(0, 100):
        top, left = crop[:2].amin((1, 2)).tolist()
        original = image[:, top : top + size, left : left + size]
        turns |= {k for k in range(8) if torch.equal(dihedral(original, k), crop)}
        corners.append((top, left))
    tops, lefts = map(set, zip(*corners, strict=True))
    assert tops == {0, 8, 16, 24} and lefts == {0, 8, 16, 24, 32} and turns == {*range(8)}


def test_other_crops_are_of_other_photos_in_the_folder(tmp_path):
    """The red level names the photo; the others the place. One photo is alone in its folder."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    files = [tmp_path / f"{name}.png" for name in ("a/0", "b/0", "a/1", "a/2")]
    for i, file in enumerate(files):
        save_image(file, torch.stack([torch.full_like(y, 60 * i), y, x]) / 255)
    photos = Photos(files, tmp_path / "decoded", CPU)
    here, there, third = (
        Crops(photos, 16, 4, 0, scale=1 + min(k, 1), other=k).batch(5, 200) for k in (0, 1, 2)
    )
    assert there.shape == (200, 3, 32, 32)
    names = [(batch[:, 0, 0, 0] // 60).tolist() for batch in (here, there, third)]
    assert {*zip(*names[:2], strict=True)} == {
        (1, 1), (0, 2), (0, 3), (2, 0), (2, 3), (3, 0), (3, 2)
    }  # fmt: skip
    assert names[1] != names[2]
    alone = torch.tensor(names[0]) == 1
    corners = [batch[alone, 1:].amin((2, 3)).tolist() for batch in (here, there)]
    assert sum(a == b for a, b in zip(*corners, strict=True)) < alone.sum() / 2


def test_packed_crops_are_alone(source, tmp_path):
    """The camera of a packed crop is not known, so its other crops are of itself."""
    crops = crops_of(source, tmp_path)
    assert [crops.neighbour(n, 7) for n in range(11)] == [*range(11)]


def test_crops_of_some_rows(files, tmp_path):
    decoded = Photos(files, tmp_path / "decoded", CPU)
    drawn = Crops(decoded, 16, 4, 0, rows=np.array([0, 2])).batch(0, 40)
    assert hits(drawn, files).any((0, 1)).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("crop", "scale", "rows", "works"),
    [(96, 1, [0, 1, 2], 64), (20, 4, [0, 1], 16), (33, 1, [2], 32)],
)
def test_a_crop_too_large_is_one_sentence_that_names_the_largest_that_works(
    files, tmp_path, crop, scale, rows, works
):
    decoded = Photos(files, tmp_path / "decoded", CPU)
    settings = {"scale": scale, "flag": "--vq-crop", "rows": np.array(rows)}
    with pytest.raises(UserError) as error:
        Crops(decoded, crop, 4, 0, **settings)
    found = f"none of {len(rows)} photos has {scale * crop} x {scale * crop} pixels"
    way_out = f"--vq-crop {works} is the largest that works."
    assert str(error.value) == f"--vq-crop {crop}: {found}; {way_out}"
    size = scale * works
    assert Crops(decoded, works, 4, 0, **settings).batch(0, 2).shape == (2, 3, size, size)


def test_photos_too_small_for_any_crop_are_one_sentence(tmp_path):
    save_image(tmp_path / "tiny.png", noise(15, 99))
    with pytest.raises(UserError, match="none of 1 photos has 16 x 16 .*take larger ones"):
        crops_of([tmp_path / "tiny.png"], tmp_path)


# ---- the packed file --------------------------------------------------------------------------


def test_packed_crops_are_native_pixels_side_by_side(photos, files, tmp_path):
    crops = torch.from_numpy(packed(tmp_path, photos))
    assert crops.dtype == torch.uint8 and crops.shape == (4 + 6 + 1, 3, 32, 32)
    a, b, c = map(load_image, files)
    # What does not fill a crop is left out at the edges, the same amount at each.
    assert [places(crop, a) for crop in crops[:4]] == [[[y, x]] for y in (1, 33) for x in (3, 35)]
    expected = [[[y, x]] for y in (0, 32) for x in (1, 33, 65)]
    assert [places(crop, b) for crop in crops[4:10]] == expected
    assert torch.equal(crops[10], to_uint8(c))


def test_few_crops_of_real_photos_are_flat(shared, tmp_path):
    folder = next(f for f in sorted((shared / "photos" / "real_lr").iterdir()) if f.is_dir())
    photos = sorted(folder.glob("*.jpg"))[:3]
    whole = packed(tmp_path, *photos, size=96, flat=0.0)
    assert len(whole) >= len(packed(tmp_path, *photos, size=96)) >= 0.8 * len(whole)


def test_detail_is_the_step_between_blocks():
    blocks = torch.tensor([[10, 40], [10, 100]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    crop = blocks.expand(1, 3, 8, 8).to(torch.uint8)
    expected = ((30**2 + 90**2 + 0**2 + 60**2) / 4) ** 0.5
    assert pack.detail(crop).item() == pytest.approx(expected)


def test_flat_crops_are_left_out_and_counted(tmp_path, capsys):
    x = torch.linspace(0.3, 0.4, 64).expand(3, 64, 64)
    noisy = x + 3 / 255 * torch.randn(3, 64, 64, generator=make_generator(1))
    sky = torch.cat([x, noisy, torch.zeros(3, 64, 64), noise(64, 64)], dim=2)
    save_image(tmp_path / "photos" / "sky.png", sky)
    kept = torch.from_numpy(packed(tmp_path, tmp_path / "photos", size=64))
    assert "left out 3 flat crops" in capsys.readouterr().out
    assert torch.equal(kept, to_uint8(noise(64, 64))[None])
    assert len(packed(tmp_path, tmp_path / "photos", size=64, flat=0.0)) == 4


def test_bad_and_small_photos_are_named_once_and_counted(photos, tmp_path, capsys):
    whole = packed(tmp_path, photos)
    (photos / "bad.png").write_text("not an image")
    save_image(photos / "tiny.png", noise(31, 200))
    capsys.readouterr()
    torch.set_num_threads(4)  # the number of threads changes nothing
    np.testing.assert_array_equal(packed(tmp_path, photos), whole)
    torch.set_num_threads(1)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert last.endswith("left out 0 flat crops and 2 photos of 5")
    for line, name in zip(lines, ("bad.png", "tiny.png"), strict=True):
        assert line.startswith("skipped: ") and name in line


def test_the_command_names_its_file_after_the_folder_of_photos(photos, tmp_path):
    """So that packed HR photos do not become the LR photos of stage 2."""
    photos.rename(tmp_path / "hr")
    command = [sys.executable, pack.__file__, "--photos", "hr/", "--size", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "11 crops of 32 x 32 pixels in hr.npy" in done.stdout
    assert names(tmp_path) == {"hr", "hr.npy"}


@pytest.mark.parametrize(
    "flags",
    ["--photos nowhere", "--out x.png", "--size 7", "--flat -1", "--flat 300", "--size 640"],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(flags, photos, tmp_path):
    argv = ["--photos", "photos", "--out", "x.npy", *flags.split()]
    assert_refused(run("tools.pack", *argv, cwd=tmp_path))
    assert names(tmp_path) == {"photos"}


@pytest.mark.parametrize(
    "content",
    [np.zeros((2, 3, 32, 32), np.float32), np.zeros((2, 32, 32, 3), np.uint8),
     np.zeros((0, 3, 32, 32), np.uint8), np.array([{}]), b"", b"not an array", None],
    ids=["float", "channels last", "none", "objects", "empty", "text", "half"],
)  # fmt: skip
def test_a_wrong_packed_file_is_one_sentence_that_names_it(content, tmp_path):
    path = tmp_path / "wrong.npy"
    np.save(path, content if isinstance(content, np.ndarray) else np.zeros((2, 3, 9, 9), np.uint8))
    if not isinstance(content, np.ndarray):
        path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="wrong.npy") as error:
        crops_of([path], tmp_path)
    assert "\n" not in str(error.value)


def test_training_alone_takes_packed_files_and_those_of_data_first(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("common.files.DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    photos.rename(tmp_path / "data" / "lr")
    files = sorted((tmp_path / "data" / "lr").iterdir())
    assert find_photos((), "lr", "--lr", packed=True) == files
    file = tmp_path / "data" / "lr.npy"
    pack.main(pack.Config((str(tmp_path / "data" / "lr"),), str(file), 32), CPU)
    capsys.readouterr()
    assert find_photos((), "lr", "--lr", packed=True) == [file]
    assert capsys.readouterr().out.count("data/lr.npy") == 1
    assert find_photos((), "lr", "--lr") == files
    assert find_photos([str(file)], "lr", "--lr", packed=True) == [file]
    with pytest.raises(UserError, match="--lr .*lr.npy: packed crops are only to train on"):
        find_photos([str(file)], "lr", "--lr")

"""Every stage runs from the command line as a user runs it, alone and with two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY_NETS = (
    "--vq-channels 8 --vq-codes 16 --deg-channels 8 --deg-blocks 1 --deg-dim 16 --mod-channels 8 "
    "--crop 64 --vq-crop 32 --batch-size 4 --log-every 1"
)
STAGE_1 = f"extractors.py {TINY_NETS}"
STAGE_2 = (
    "diffusion.py --widths 8 16 --attention 1 --mod-channels 8 --cond-channels 4 --crop 32 "
    "--batch-size 2 --log-every 1 --checkpoint runs/extractors/last.pt"
)


def run(command: str, cwd: Path, *more: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script of the repository in another folder."""
    script, *rest = command.split()
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [*start, str(ROOT / script), *rest, *more]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


def good(result: subprocess.CompletedProcess) -> str:
    """Output of a run that must have succeeded."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which stages 1 and 2 have been trained for two steps on data/sample."""
    folder = tmp_path_factory.mktemp("trained")
    good(run(STAGE_1, folder, "--steps", "2"))
    good(run(STAGE_2, folder, "--steps", "2"))
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_training_stages_run_and_resume(tmp_path: Path, processes: int) -> None:
    out = good(run(STAGE_1, tmp_path, "--steps", "2", processes=processes))
    assert "last 2/2" in out and (tmp_path / "runs/extractors/last.pt").is_file()
    out = good(run(STAGE_2, tmp_path, "--steps", "2", processes=processes))
    assert "last 2/2" in out and (tmp_path / "runs/diffusion/last.pt").is_file()
    for stage in (STAGE_1, STAGE_2):
        out = good(run(stage, tmp_path, "--steps", "3", processes=processes))
        assert "resuming" in out and "at step 2" in out and "last 3/3" in out


def photo(path: Path, width: int, height: int, mode: str = "RGB", **options: object) -> None:
    """Draw a smooth colour photo and save it in a given mode."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 256], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path, **options)


def test_generate_writes_aligned_pairs_once_and_heals(trained: Path, tmp_path: Path) -> None:
    hr = tmp_path / "hr"
    hr.mkdir()
    photo(hr / "a.png", 101, 78)
    photo(hr / "b.png", 64, 64)
    command = f"generate.py --hr {hr} --out {tmp_path / 'out'} --candidates 2"
    assert "2 pairs" in good(run(command, trained))
    out = tmp_path / "out"
    files = sorted(p for p in out.rglob("*") if p.is_file())
    names = [str(p.relative_to(out)) for p in files]
    assert names == sorted([*(f"{d}/{n}.png" for d in ("hr", "lr") for n in "ab"),
                            "pairs.jsonl", "preview.png"])  # fmt: skip
    assert Image.open(out / "hr/a.png").size == (100, 76)
    assert Image.open(out / "lr/a.png").size == (25, 19)
    records = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records] == ["lr/a.png", "lr/b.png"]
    assert all(len(r["content_errors"]) == len(r["degradation_errors"]) == 2 for r in records)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    good(run(command, trained))
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    (out / "lr/a.png").unlink()
    good(run(command, trained))
    assert (out / "lr/a.png").read_bytes() == before[out / "lr/a.png"][0]
    result = run(command, trained, "--seed", "7")
    assert result.returncode == 2 and "other settings (seed)" in result.stderr


def test_generate_takes_every_kind_of_image_and_skips_the_broken(
    trained: Path, tmp_path: Path
) -> None:
    hr = tmp_path / "hr"
    hr.mkdir()
    for mode in ("L", "LA", "RGBA", "P", "I;16"):
        photo(hr / f"good_{mode.strip(';')}.png", 64, 48, mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    photo(hr / "good_rotated.jpg", 64, 48, exif=exif)
    (hr / "bad_text.png").write_text("no image")
    photo(hr / "bad_cut.jpg", 256, 256)
    whole = (hr / "bad_cut.jpg").read_bytes()
    (hr / "bad_cut.jpg").write_bytes(whole[: len(whole) // 2])
    photo(hr / "bad_tiny.png", 20, 20)
    out = good(run(f"generate.py --hr {hr} --out {tmp_path / 'out'} --candidates 1", trained))
    assert "6 pairs" in out and "3 images skipped" in out
    for name in ("bad_text.png", "bad_cut.jpg", "bad_tiny.png"):
        assert name in out
    assert Image.open(tmp_path / "out/lr/good_rotated.png").size == (12, 16)
    assert not list((tmp_path / "out").rglob("*bad*"))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--hr nowhere", "nowhere"),
        ("--hr empty", "no images"),
        ("--lr-ref nowhere", "--lr-ref"),
        ("--start foo", "--start foo"),
        ("--t-start -1", "--t-start -1"),
        ("--candidates 0", "--candidates 0"),
        ("--num-steps 0", "--num-steps 0"),
        ("--checkpoint nowhere.pt", "nowhere.pt"),
        ("--checkpoint runs/extractors/last.pt", "not a checkpoint of diffusion.py"),
        ("--device nonsense", "nonsense"),
        ("--no-such-flag", "no-such-flag"),
    ],
)
def test_generate_refuses_wrong_flags_before_any_work(
    trained: Path, tmp_path: Path, flags: str, word: str
) -> None:
    (trained / "empty").mkdir(exist_ok=True)
    result = run(f"generate.py {flags} --out {tmp_path / 'out'}", trained)
    assert result.returncode == 2 and word in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_generate_with_only_broken_images_says_so(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    result = run(f"generate.py --hr {tmp_path / 'text.png'} --out {tmp_path / 'out'}", trained)
    assert result.returncode == 2 and "none of the HR images" in result.stderr
    result = run(f"generate.py --lr-ref {tmp_path / 'text.png'} --out {tmp_path / 'out'}", trained)
    assert result.returncode == 2 and "--lr-ref" in result.stderr


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("extractors.py --hr nowhere", "nowhere"),
        ("extractors.py --crop 50", "--crop 50"),
        ("extractors.py --recipes foo", "foo"),
        ("extractors.py --batch-size 2", "--batch-size 2"),
        ("diffusion.py --lr nowhere", "nowhere"),
        ("diffusion.py --content-from foo", "--content-from foo"),
        ("diffusion.py --crop 31", "--crop 31"),
    ],
)
def test_training_refuses_wrong_flags_before_any_work(
    trained: Path, tmp_path: Path, command: str, word: str
) -> None:
    result = run(f"{command} --preset small --out {tmp_path / 'out'}", trained)
    assert result.returncode == 2 and word in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()

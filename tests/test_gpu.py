"""Every stage on a GPU, as a user runs it: two checkpoints, a resume, and what it cost.

python -m pytest -m gpu -s
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
SHORT = "--log-every 5 --save-every 10 --device cuda"
STAGES = {  # by command: where its checkpoint is, and how its second call goes on
    f"extractors.py --batch-size 64 --steps 20 20 20 {SHORT}": (
        "runs/extractors/last.pt",
        "20 20 30",
    ),
    f"diffusion.py --batch-size 64 --steps 20 {SHORT}": ("runs/diffusion/last.pt", "30"),
    f"sr.py --preset smoke --steps 20 {SHORT}": ("runs/sr/fsrcnn-realesrgan.pt", "30"),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(command: str, cwd: Path) -> str:
    """What a command prints."""
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, str(REPO / script), *flags],
        cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has trained, been resumed, and told its speed."""
    cwd = tmp_path_factory.mktemp("gpu")
    for command, (path, more) in STAGES.items():
        run(command, cwd)
        assert torch.load(cwd / path, weights_only=True)["step"] == 20
        printed = run(re.sub(r"--steps [\d ]+", f"--steps {more} ", command), cwd)
        assert "at step 20" in printed, printed
        assert torch.load(cwd / path, weights_only=True)["step"] == 30
    return cwd


def test_every_stage_trains_resumes_and_tells_speed_and_memory(trained):
    for path, _ in STAGES.values():
        lines = (trained / path).with_name("log.jsonl").read_text().splitlines()
        rows = {row["part"]: row for row in map(json.loads, lines) if "images/s" in row}
        assert rows
        for part, row in rows.items():
            print(f"\n{path} {part}: {row['images/s']:.0f} images/s, {row['GiB']:.2f} GiB")
            assert row["images/s"] > 0 and row["GiB"] > 0


def test_checkpoints_leave_pictures(trained):
    for name in ("extractors/vqvae", "extractors/content", "extractors/last", "diffusion/last"):
        assert (trained / "runs" / f"{name}.png").stat().st_size > 1000


def test_a_batch_that_does_not_fit_goes_in_parts(trained):
    """`--preset paper` at its crop, whose batch of 64 needs more than a GPU has."""
    flags = "--preset paper --no-compile --vq-crop 256 --crop 192 --batch-size 64 --steps 2 0 0"
    printed = run(f"extractors.py {flags} --out paper --device cuda --log-every 1", trained)
    lines = (trained / "paper/log.jsonl").read_text().splitlines()
    print(f"\npaper: {json.loads(lines[-1])}")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert json.loads(lines[-1])["GiB"] < total
    assert total > 90 or "parts, as memory asks for" in printed


@pytest.mark.parametrize(
    "flags", ["", "--start realesrgan --t-start 20 --num-steps 4 --candidates 2"]
)
def test_pairs_are_generated_and_taken_up_again(trained, flags):
    command = f"generate.py --device cuda --out pairs{len(flags)} {flags}"
    run(command, trained)
    files = {path: path.read_bytes() for path in (trained / f"pairs{len(flags)}/lr").iterdir()}
    run(command, trained)
    assert files and files == {path: path.read_bytes() for path in files}


def test_a_batch_on_a_gpu_is_what_each_image_is_alone_but_for_rounding(trained):
    import common
    import generate

    device = torch.device("cuda")
    net = generate.load_generator("", device, grain=True)
    hr = torch.rand(4, 3, 256, 256, generator=common.generator(0)).to(device)
    refs = [torch.rand(3, 64, 64, generator=common.generator(b)) for b in range(4)]
    together, _ = generate.generate(net, hr, refs, generate.Sampler(), range(4))
    for b in range(4):
        alone, _ = generate.generate(net, hr[b : b + 1], refs[b : b + 1], generate.Sampler(), [b])
        assert (together[b] - alone[0]).abs().mean() < 2 / 255


def test_a_folder_is_degraded(trained):
    run("degrade.py --device cuda --out degraded", trained)
    assert list((trained / "degraded/lr").iterdir())

"""Every stage on a GPU, as a user runs it: training, resuming, speed and memory, generation.

python -m pytest -m gpu -s
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import generate
from common.runtime import make_generator

REPO = Path(__file__).resolve().parents[1]
SHORT = "--log-every 5 --save-every 10"
STAGES = {  # by command: the steps of the first and of the second call, the checkpoint
    f"extractors --batch-size 64 {SHORT}": ("20 20 20", "20 20 30", "runs/extractors/last.pt"),
    f"diffusion --batch-size 64 {SHORT}": ("20", "30", "runs/diffusion/last.pt"),
    f"bench.sr --preset smoke {SHORT}": ("20", "30", "runs/sr/fsrcnn-realesrgan.pt"),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(command: str, cwd: Path) -> str:
    """What a command prints: a module of this repository and its flags."""
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LC_ALL": "C", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--device", "cuda"],
        cwd=cwd, capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has trained and resumed."""
    cwd = tmp_path_factory.mktemp("gpu")
    for command, (first, second, path) in STAGES.items():
        run(f"{command} --steps {first}", cwd)
        assert torch.load(cwd / path, weights_only=True)["step"] == 20
        assert "at step 20" in run(f"{command} --steps {second}", cwd)
        assert torch.load(cwd / path, weights_only=True)["step"] == 30
    return cwd


def test_every_stage_trains_and_logs_speed_and_memory(trained):
    for *_, path in STAGES.values():
        lines = (trained / path).with_name("log.jsonl").read_text().splitlines()
        rows = {row["phase"]: row for row in map(json.loads, lines) if "images/s" in row}
        assert rows
        for phase, row in rows.items():
            print(f"\n{path} {phase}: {row['images/s']:.0f} images/s, {row['GiB']:.2f} GiB")
            assert row["images/s"] > 0 and row["GiB"] > 0
    for name in ("extractors/vqvae", "extractors/content", "extractors/last", "diffusion/last"):
        assert (trained / "runs" / f"{name}.png").stat().st_size > 1000


def test_a_batch_that_does_not_fit_is_divided_into_micro_batches(trained):
    """`--preset paper` at its crop, whose batch of 64 needs more than a GPU has."""
    flags = "--preset paper --no-compile --vq-crop 256 --crop 192 --batch-size 64 --steps 2 0 0"
    printed = run(f"extractors {flags} --out paper --log-every 1", trained)
    lines = (trained / "paper/log.jsonl").read_text().splitlines()
    print(f"\npaper: {json.loads(lines[-1])}")
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert json.loads(lines[-1])["GiB"] < total
    assert total > 90 or "memory is short" in printed


def test_the_preset_paper_trains_compiled(trained):
    """Its networks are compiled by default; small ones, which take less time to compile."""
    small = "--preset paper --batch-size 8 --steps 2 --log-every 1"
    stage_1 = "--vq-channels 32 --deg-blocks 2 --vq-crop 64 --crop 64 --out compiled/extractors"
    stage_2 = "--widths 32 64 --attention 1 --crop 32 --out compiled/diffusion"
    checkpoint = "--checkpoint compiled/extractors/last.pt"
    for command in (f"extractors {small} {stage_1}", f"diffusion {small} {stage_2} {checkpoint}"):
        began = time.time()
        assert "torch.compile does not work" not in run(command, trained)
        print(f"\n{command.split()[0]}: compiled in {time.time() - began:.0f} s")
        path = trained / f"compiled/{command.split()[0]}/last.pt"
        assert torch.load(path, weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    "flags", ["", "--start realesrgan --t-start 20 --num-steps 4 --candidates 2"]
)
def test_pairs_are_generated_and_a_second_call_keeps_them(trained, flags):
    command, folder = f"generate --out pairs{len(flags)} {flags}", trained / f"pairs{len(flags)}/lr"
    run(command, trained)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    run(command, trained)
    assert files and files == {path: path.read_bytes() for path in files}


def test_each_image_of_a_batch_is_generated_as_if_it_were_alone_but_for_rounding():
    device = torch.device("cuda")
    net = generate.load_generator("", device)
    hr = torch.rand(4, 3, 256, 256, generator=make_generator(0)).to(device)
    refs = [torch.rand(3, 64, 64, generator=make_generator(b)) for b in range(4)]
    together, _ = generate.generate(net, hr, refs, generate.Sampler(), range(4))
    for b in range(4):
        alone, _ = generate.generate(net, hr[b : b + 1], refs[b : b + 1], generate.Sampler(), [b])
        assert (together[b] - alone[0]).abs().mean() < 2 / 255


def test_a_folder_is_degraded(trained):
    run("degrade --out degraded", trained)
    assert list((trained / "degraded/lr").iterdir())


def test_the_benchmark_runs_on_sample_photos_in_about_a_minute(trained):
    began = time.time()
    printed = run("benchmark --checkpoint runs/diffusion/last.pt", trained)
    print(f"\nbenchmark.py: {time.time() - began:.0f} s")
    assert "testing on sample photos" in printed and "Table 1" in printed
    tables = "control mtf factors extractors leakage figure1 6"
    small = "--images 2 --crop 64 --sr-steps 2 --t-starts 5"
    run(f"benchmark --table {tables} {small} --checkpoint runs/diffusion/last.pt", trained)
    assert len(list((trained / "out/benchmark").glob("*.md"))) == 9

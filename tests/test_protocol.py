"""The paper's protocol: all tables in both presets, releases of data sets, other weights."""

import json
from dataclasses import asdict, replace

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import photo, write
from PIL import Image

import benchmark
import diffusion
import extractors
from bench import control, downstream, factors, generated, leakage, sr
from bench.inputs import AS_PRINTED, SYNDIFF, Config, Inputs, resolved
from common.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
STAGE_1 = extractors.Config(
    compile=False, vq_channels=8, vq_multipliers=(1, 2, 2), vq_blocks=1, vq_codes=16,
    deg_channels=8, deg_blocks=1, deg_dim=16, mod_channels=8,
)  # fmt: skip
STAGE_2 = diffusion.Config(
    compile=False, widths=(8, 16), blocks=1, attention=(1,), mod_channels=8, cond_channels=4
)


def write_weights(path, as_printed=True, **changes):
    """A tiny untrained model."""
    torch.manual_seed(0)
    stage_1 = replace(STAGE_1, as_printed=as_printed)
    stage_2 = replace(STAGE_2, as_printed=as_printed, **changes)
    net = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = asdict(stage_2) | {"extractors": asdict(stage_1), "began": "0"}
    torch.save({"ema": net.state_dict(), "config": config}, path)


def write_pair(folder, number, hr, lr):
    image = photo(number, 129)
    write(folder / hr, image)
    small = Image.fromarray(image[:128, :128]).resize((32, 32), Image.Resampling.BOX)
    write(folder / lr, np.asarray(small))


def write_release(folder):
    """RealSR as released: 3 pairs of Train and 4 of Test at scale 4, 1 of each at scale 2."""
    for part, count in (("Train", 3), ("Test", 4)):
        for i in range(count):
            name = f"Canon/{part}/4/Canon_00{i}"
            write_pair(folder, i + 4 * (part == "Train"), f"{name}_HR.png", f"{name}_LR4.png")
        name = f"Canon/{part}/2/Canon_000"
        write_pair(folder, 9, f"{name}_HR.png", f"{name}_LR2.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a release, photos, and tiny weights of every kind."""
    folder = tmp_path_factory.mktemp("protocol")
    write_release(folder / "set")
    for number in range(4):
        write(folder / f"data/hr/{number}.png", photo(number, 128))
        write(folder / f"data/lr/{number % 2}/{number}.png", photo(number + 5, 32))
    write_weights(folder / "runs/diffusion/last.pt", as_printed=False)
    write_weights(folder / AS_PRINTED)
    write_weights(folder / SYNDIFF, without=("content", "degradation"))
    changes = (
        {"without": ("degradation",)},
        {"without": ("content",)},
        {"finetune_learning_rate": 0},
    )
    for (path, _), change in zip([*downstream.ABLATIONS.values()][:3], changes, strict=True):
        write_weights(folder / path, **change)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Networks and tables in the smallest size."""
    tiny = lambda name, scale=4: sr.FSRCNN(scale, d=4, s=2, m=1)  # noqa: E731
    loss = lambda x, y, normalize: F.l1_loss(x, y)  # noqa: E731
    for module in (sr.metrics, downstream):
        monkeypatch.setattr(module, "perceptual_net", lambda *_: loss)
    monkeypatch.setattr(sr, "sr_network", tiny)
    for preset in ("paper", "smoke"):
        monkeypatch.setitem(sr.PRESETS, preset, {"batch_size": 2, "compile": False, "crop": 16})
    monkeypatch.setattr(generated, "FULL", 2)
    monkeypatch.setattr(downstream, "EVALUATIONS", 2)
    monkeypatch.setattr(factors, "FACTORS", {"blur": factors.FACTORS["blur"]})
    monkeypatch.setattr(factors, "LEVELS", 2)
    monkeypatch.setattr(leakage, "SAMPLES", 2)
    monkeypatch.setattr(control, "KERNEL_NOISES", (0.0,))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no weights"))


FLAGS = "--device cpu --pairs set --hr data/hr --lr data/lr --images 2 --crop 32 --sr-steps 1"
FLAGS += " --data bsrgan syndiff realdgen --num-steps 2 --candidates 2"


def psnr(x, y):
    return -10 * np.log10(((np.asarray(x, float) - np.asarray(y, float)) ** 2).mean() / 255**2)


@pytest.mark.parametrize("preset", benchmark.PRESETS)
def test_every_table_runs(workplace, small, preset, monkeypatch):
    """Each table passes its checks alone; then all are made by one command."""
    monkeypatch.chdir(workplace)
    for name in benchmark.TABLES:
        flags = benchmark.PRESETS[preset] | {"table": (name,), "crop": 32}
        cfg = Config(pairs=("set",), hr=("data/hr",), lr=("data/lr",), **flags)
        assert callable(benchmark.TABLES[name](name, Inputs(resolved(cfg, CPU), CPU)))
    flags = f"--preset {preset} {FLAGS} --out {preset}"
    done = commands.run("benchmark.py", *flags.split(), "--table", *benchmark.TABLES, cwd=workplace)
    assert done.returncode == 0, done.stderr
    results = json.loads((workplace / preset / "results.json").read_text())["tables"]
    assert set(results) == set(benchmark.TABLES)
    text = {name: (workplace / preset / f"{benchmark.stem_of(name)}.md").read_text()
            for name in results}  # fmt: skip
    assert "nan" not in " ".join(text.values())
    assert "is left out" not in " ".join(text.values())
    values = {name: table["values"] for name, table in results.items()}
    # Rows with other weights.
    methods = {row["method"] for row in values["2"]["set"]}
    assert {"SynDiff", "RealDGen as printed, own LR", "RealDGen as printed, other scene"} < methods
    assert "RealDGen as printed, all other scenes" not in methods
    assert [row["method"] for row in values["6"]["set"]][2:] == ["SynDiff"]
    assert {"SynDiff", "RealDGen as printed"} < set(values["control"]["rows"])
    assert "SynDiff" in values["figure1"]["labels"]
    assert [row["lr"] for row in values["factors"]["rows"]][-1] == "as printed"
    labels = {table: [row["label"] for row in values[table]["rows"][1:]] for table in "34"}
    assert labels == {"3": ["T=200", "T=300", "T=400", "T=500"], "4": [*downstream.ABLATIONS]}
    networks = {row["network"] for row in values["1"]["rows"][1:]}
    paper = {"swinir", "rrdb", "hat", "swinir-l"}
    assert networks == (paper if preset == "paper" else {"fsrcnn"})
    losses = {row["perceptual"] for row in values["1"]["rows"]}
    assert losses == ({False, True} if preset == "paper" else {False})
    # Train gives references, Test is tested whole. Two rows, computed from the files.
    assert values["control"]["trained"] == {"set": 3} and values["1"]["tested"] == {"set": 4}
    assert "set: references are of Train (3), tested are all of Test (4)." in text["1"]
    reduced, enlarged = [], []
    for i in range(4):
        hr, lr = (Image.open(workplace / f"set/Canon/Test/4/Canon_00{i}_{kind}.png")
                  for kind in ("HR", "LR4"))  # fmt: skip
        hr = hr.crop((0, 0, 128, 128))
        reduced.append(psnr(hr.resize((32, 32), Image.Resampling.BICUBIC), lr))
        enlarged.append(psnr(lr.resize((128, 128), Image.Resampling.BICUBIC), hr))
    bicubic = next(row for row in values["2"]["set"] if row["method"] == "bicubic")
    assert bicubic["n"] == 4
    assert bicubic["mean"]["PSNR RGB"] == pytest.approx(np.mean(reduced), abs=1e-4)
    found = values["1"]["rows"][0]["runs"][0]["set"]["mean"]["PSNR RGB"]
    assert found == pytest.approx(np.mean(enlarged), abs=0.01)
    # The paper's figures stand where the layout is that of a release, under Tables 1 and 2 alone.
    assert "RealDGen (paper), on Test of RealSR: PSNR 26.16" in text["2"]
    assert ("[28.135]" not in text["1"]) and ("[25.997]" in text["1"]) == (preset == "paper")
    assert not any("In brackets" in text[name] for name in "3457")

"""benchmark.py: every table by name, what it writes, and what it says of bad input."""

import json
import math
from dataclasses import fields
from pathlib import Path

import commands
import pytest
import torch
from drawn import bicubic_for_realdgen, fake_net, photo, scenes, write, write_pairs

import benchmark
import generate
from bench import control, inputs, sr
from common.images import load_image, save_image
from common.run import Run

ROOT = Path(benchmark.__file__).parent
SHIPPED = ROOT / "data/pretrained/diffusion.safetensors"


pytestmark = pytest.mark.usefixtures("no_metric_weights")


def run(folder, *flags):
    """The command with these flags, in a folder."""
    return commands.run("benchmark.py", "--device", "cpu", *flags, cwd=folder)


def tables_of(folder):
    """The values of all tables of a run in a folder, by their name."""
    results = json.loads((folder / "out/benchmark/results.json").read_text())
    return {name: table["values"] for name, table in results["tables"].items()}


@pytest.fixture
def copying_generator(monkeypatch):
    """The reference stands in for generated LR, and its image for F_deg. Returns the samplers."""
    samplers = []

    def fake_generate(net, hr, lr_ref, sampler, seeds):
        samplers.append(sampler)
        size = (hr.shape[2] // 4, hr.shape[3] // 4)
        lr = torch.stack([torch.nn.functional.interpolate(x[None], size)[0] for x in lr_ref])
        candidates = torch.stack([torch.zeros_like(lr)] * (sampler.candidates - 1) + [lr], dim=1)
        return candidates, {"kept": torch.full((len(hr),), candidates.shape[1] - 1)}

    monkeypatch.setattr(generate, "load_generator", lambda *_: fake_net())
    monkeypatch.setattr(generate, "generate", fake_generate)
    degradation = lambda net, lr: lr[None]  # noqa: E731
    monkeypatch.setattr(generate, "degradation_of", degradation)
    return samplers


def test_table_2_has_each_method_and_every_value(tmp_path, copying_generator):
    write_pairs(tmp_path / "RealSR")
    flags = "--pairs RealSR --table 2 --t-start 9 --candidates 2 --start realesrgan".split()
    assert run(tmp_path, *flags).returncode == 0
    results = json.loads((tmp_path / "out/benchmark/results.json").read_text())
    rows = {row["method"]: row for row in results["tables"]["2"]["values"]["RealSR"]}
    counts = {"bicubic": 5, "best Gaussian of the set*": 5, "best Gaussian of each pair*": 5,
              "Real-ESRGAN": 5, "BSRGAN": 5}  # fmt: skip
    for name in ("RealDGen T=0", "RealDGen"):
        counts |= {f"{name}, own LR": 5, f"{name}, other scene": 4, f"{name}, all other scenes": 4}
    assert {name: row["n"] for name, row in rows.items()} == counts
    # The kept candidate is the reference: the own LR equals the real LR, another scene does not.
    for name in ("RealDGen T=0", "RealDGen"):
        assert rows[f"{name}, own LR"]["mean"]["PSNR RGB"] == 100
        other = rows[f"{name}, other scene"]["images"]
        assert set(other) == {"Canon_1", "Canon_2", "Nikon_1", "Nikon_2"}
        first, second = (load_image(tmp_path / f"RealSR/LR/Canon_{i}.png") for i in (1, 2))
        expected = -10 * math.log10((first - second).square().mean())
        assert other["Canon_1"]["PSNR RGB"] == pytest.approx(expected, abs=1e-4)
    means = [rows[name]["mean"]["PSNR RGB"] for name in (*counts,)[:3]]
    assert means[2] >= means[1] > means[0] - 0.1  # Gaussians fitted to the real LR
    assert {s.t_start: s.start for s in copying_generator} == {0: "reconstruct", 9: "realesrgan"}
    # No weights: no number, neither in the table nor in the file.
    table = (tmp_path / "out/benchmark/table2.md").read_text()
    assert "LPIPS" not in rows["bicubic"]["mean"] and "| - | - | 5 |" in table
    assert "rows of other scenes: 1." in table and "Canon 2, Nikon 2, Sony 1" in table
    assert "(paper)" not in table, "a folder's name makes it no benchmark"
    assert "SynDiff is left out: runs/syndiff/last.pt is missing (make it by `python" in table
    assert results["config"]["t_start"] == 9 and results["torch"] == torch.__version__


def test_table_6_compares_the_filter_on_the_same_pairs(tmp_path, copying_generator):
    write_pairs(tmp_path / "mine")
    assert run(tmp_path, "--pairs", "mine", "--table", "6").returncode == 0
    rows = tables_of(tmp_path)["6"]["mine"]
    assert [row["method"] for row in rows] == ["without filter", "with filter, K=4"]
    assert len({tuple(row["images"]) for row in rows}) == 1
    assert {s.candidates for s in copying_generator} == {1, 4}


def test_the_sampler_and_its_presets_serve_here_too():
    """The same settings, with the same defaults, in both commands; not only the same names."""
    for preset in benchmark.PRESETS:
        here, there = (of.Config(**of.PRESETS[preset]) for of in (benchmark, generate))
        for field in fields(generate.Sampler):
            assert getattr(here, field.name) == getattr(there, field.name)


def test_the_tables_and_flags_that_go_together_exist():
    assert {table for tables in inputs.ACTS_ON.values() for table in tables} == {*benchmark.TABLES}
    assert {*inputs.ACTS_ON} < {field.name for field in fields(benchmark.Config)}


def test_without_arguments_both_tables_are_made_of_sample_photos(tmp_path, monkeypatch):
    """With the shipped weights, and small photos in place of data/sample."""
    for number, x in enumerate(scenes(4, 128)):
        save_image(tmp_path / f"data/sample/hr/{number}.png", x)
    monkeypatch.setattr(inputs, "SAMPLE", tmp_path / "data/sample/hr")
    monkeypatch.setattr("common.files.DATA", tmp_path / "data")
    monkeypatch.setattr(inputs, "DATA", tmp_path / "data")  # no pairs of the user
    monkeypatch.setitem(sr.PRESETS, "smoke", sr.PRESETS["smoke"] | {"steps": 2})
    done = run(tmp_path)
    printed = done.stdout
    assert done.returncode == 0
    assert "testing on sample photos degraded by D" in printed
    for name in ("table1", "table2"):
        text = (tmp_path / f"out/benchmark/{name}.md").read_text()
        assert text in printed and "nan" not in text


# ---- bad input ----------------------------------------------------------------------------------


def unequal_names(folder):
    (folder / "LR/Canon_1.png").rename(folder / "LR/Canon_7.png")


def unequal_scales(folder):
    write(folder / "HR/Canon_2.png", photo(0, 96))


def no_lr(folder):
    (folder / "LR").rename(folder / "elsewhere")


def all_corrupt(folder):
    for file in (folder / "LR").iterdir():
        file.write_bytes(b"")


def tiny(folder):
    write(folder / "HR/Canon_1.png", photo(0, 64))
    write(folder / "LR/Canon_1.png", photo(0, 16))


def same_stem_twice(folder):
    write(folder / "LR/Canon_1.bmp", photo(0, 48))


def published(folder):
    """A published set of which one LR image is too narrow."""
    write(folder.parent / "RealSR/Nikon/Test/4/Nikon_002_HR.png", photo(0, 200))
    write(folder.parent / "RealSR/Nikon/Test/4/Nikon_002_LR4.png", photo(0, 50, 47))


def alone(folder):
    write_pairs(folder.parent / "alone", ["a_1", "b_1"])


def other_network(folder):
    torch.save({"ema": {}, "config": {"sr": "hat", "scale": 4}}, folder.parent / "hat.pt")


def ablations(folder):
    for name in ("as-printed/diffusion", "no_degradation", "no_content", "frozen"):
        file = folder.parent / f"runs/{name}/last.pt"
        file.parent.mkdir(parents=True)
        torch.save({"ema": {}, "config": {}}, file)


@pytest.mark.parametrize(
    "spoil, flags, sentence",
    [
        (None, "--pairs nowhere", "--pairs nowhere: no such folder"),
        (None, "--pairs set/HR", "no images as HR/ and LR/ with the same names, or RealSR"),
        (no_lr, "--pairs set", "2 HR and 0 LR images; 2 names are of one kind only"),
        (unequal_names, "--pairs set", "of one kind only, such as Canon_1, Canon_7"),
        (unequal_scales, "--pairs set", "96 x 96 HR and 48 x 48 LR pixels, not 24 x 24 (scale 4)"),
        (published, "--pairs RealSR", "200 x 200 HR and 47 x 50 LR pixels, not 50 x 50 (scale 4)"),
        (tiny, "--pairs set", "under 32 x 32"),
        (same_stem_twice, "--pairs set", "LR/Canon_1.png: set/LR/Canon_1.bmp has the same name"),
        (all_corrupt, "--pairs set", "none of its pairs can be read"),
        (None, "--pairs set ./set", "two folders have the name set"),
        (None, "--pairs set --table 9", "--table 9: choose among 1, 3, 4, 5, 7, control"),
        (None, "--sr srcnn", "--sr srcnn: choose among swinir, swinir-l, rrdb, hat, fsrcnn"),
        (None, "--data real", "--data real: choose among bicubic, bsrgan"),
        (None, "--data syndiff", "runs/syndiff/last.pt is missing: make it by `python diffusion"),
        (None, "--sr-preset tiny", "--sr-preset tiny: choose among small, paper"),
        (None, "--seeds 0", "--seeds 0"),
        (None, "--pairs set --hr nowhere", "--hr nowhere: no such file or folder"),
        (None, "--sr-start-from no.pt", "--sr-start-from no.pt: no such file"),
        (None, f"--sr-start-from {SHIPPED}", "not a network of bench.sr"),
        (other_network, "--sr-start-from hat.pt", "hat.pt: a hat, which --sr does not name"),
        (None, "--table 4", "runs/as-printed/diffusion/last.pt is missing: make it by `python ext"),
        (None, "--average 3 --table 2 6", "--average acts on none of the tables 2, 6, only on 1,"),
        (None, "--images 5", "--images acts on none of the tables 2, 1, only on figure1, mtf, rem"),
        (None, "--sr hat --table 2", "--sr acts on none of the tables 2, only on 1, 3, 4, 5, 7"),
        (None, "--batch-size 4 --table mtf", "--batch-size acts on none of the tables mtf, only"),
        (ablations, "--table 4", "not a checkpoint of diffusion"),
        (None, "--table factors --hr set/LR --crop 32", "0 are photos of 128 x 128"),
        (None, "--table factors --crop 60", "--crop 60: must be a multiple of 8"),
        (None, "--table extractors --hr set/HR --crop 32 --lr nowhere", "--lr nowhere: no such"),
        (None, "--table leakage --pairs set", "leakage needs a set with a camera of 4 scenes"),
        (None, "--table control --pairs set", "--pairs set: no camera has three scenes"),
        *((alone, f"--table {name} --pairs alone", "--pairs alone: no camera has two scenes")
          for name in ("mtf", "leak", "pictures")),
        (None, "--pairs set --batch-size 0", "--batch-size 0"),
        (None, "--pairs set --start noise", "--start noise: choose reconstruct, realesrgan"),
        (None, "--pairs set --eta 2", "--eta 2"),
        (None, "--pairs set --t-start 900", "T = 900: the weights know 500 steps"),
        (None, "--pairs set --table 3 --t-starts 200 501", "T = 501: the weights"),
        (None, "--pairs set --checkpoint no.pt", "no.pt: no such file"),
        (None, "--perceptual-weight -1", "--perceptual-weight -1"),
        (None, "--preset paper --table 1", "Or train with L1 alone: --perceptual-weight 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, spoil, flags, sentence):
    write_pairs(tmp_path / "set", ["Canon_1", "Canon_2"])
    if spoil is not None:
        spoil(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, *flags.split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and sentence in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_control_and_table_1_train_networks_of_their_own_in_one_run(tmp_path, monkeypatch):
    """Once both named a network fsrcnn-bicubic-SEED-STEPS, and the second was refused."""
    write_pairs(tmp_path / "set", [f"Canon_{number}" for number in range(4)])
    bicubic_for_realdgen(monkeypatch)
    monkeypatch.setattr(control, "KERNEL_NOISES", (0.0,))
    flags = "--pairs set --hr set/HR --data bicubic --sr-steps 1 --t-starts 0".split()
    done = run(tmp_path, "--table", "1", "control", *flags)
    assert done.returncode == 0, done.stderr
    tables = tables_of(tmp_path)
    assert len(tables["1"]["rows"]) == 2 and len(tables["control"]["rows"]) == 11
    weights = {file.name for file in tmp_path.glob("out/benchmark/sets/*/sr/*.safetensors")}
    names = {f"fsrcnn-{name}-0-1.safetensors" for name in ("bicubic", "control-bicubic")}
    assert names < weights and len(weights) == 1 + len(tables["control"]["rows"])


def test_an_interrupted_benchmark_uses_its_trained_networks_again(tmp_path, monkeypatch):
    write_pairs(tmp_path / "set")
    trained = []
    monkeypatch.setattr(sr, "super_resolve", lambda net, lr: lr.repeat_interleave(4, 2)
                        .repeat_interleave(4, 3))  # fmt: skip
    update = Run.update
    monkeypatch.setattr(Run, "update", lambda self, *x: trained.append(1) or update(self, *x))
    flags = "--pairs set --hr set/HR --sr fsrcnn --data bicubic --sr-steps 1".split()
    assert run(tmp_path, *flags).returncode == 0 and len(trained) == 1
    assert run(tmp_path, *flags).returncode == 0 and len(trained) == 1
    assert run(tmp_path, *flags, "--sr", "fsrcnn", "swinir-l").returncode == 0
    assert len(trained) == 2, "naming a transformer changes nothing for FSRCNN"

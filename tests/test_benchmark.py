"""Pairs, the methods, Table 2 end to end, and what the command line says of bad input."""

import functools
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import bicubic_rows
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

import benchmark
import common
import generate
from bench import downstream
from bench.pairs import other_scenes

ROOT = Path(benchmark.__file__).parent
SHIPPED = ROOT / "data/pretrained/diffusion.safetensors"
STAGE_1 = ROOT / "data/pretrained/extractors.safetensors"


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(number, height, width=None):
    """A smooth drawn image, uint8 (height, width, 3)."""
    sides = np.arange(height), np.arange(width or height), np.arange(3)
    y, x, c = np.meshgrid(*sides, indexing="ij")
    return (127 + 60 * np.sin(x / (9 + number) + c) + 60 * np.cos(y / (7 + number))).astype(
        np.uint8
    )


def write_pairs(folder, names=("Canon_1", "Canon_2", "Nikon_1", "Nikon_2", "Sony_1"), scale=4):
    for number, name in enumerate(names):
        hr = photo(number, 48 * scale)
        write(folder / "HR" / f"{name}.png", hr)
        lr = Image.fromarray(hr).resize((48, 48), Image.Resampling.BOX)
        write(folder / "LR" / f"{name}.png", np.asarray(lr))
    return folder


# ---- pairs --------------------------------------------------------------------------------------


def test_camera_is_the_sub_folder_else_the_leading_letters():
    cameras = {
        "Canon_001_LR4": "Canon",
        "P1140122_x1": "P",
        "DSC_1045_x1": "DSC",
        "0001": "",
        "my-phone/IMG_0001": "my-phone",
        "Nikon/2020/a_1": "Nikon",
    }
    assert {name: benchmark.camera_of(name) for name in cameras} == cameras


@given(cameras=st.lists(st.sampled_from("ABCD"), max_size=30), seed=st.integers(0, 2**31))
def test_other_scene_is_another_one_of_the_same_camera(cameras, seed):
    other = other_scenes(cameras, seed)
    assert all(i != j and cameras[i] == cameras[j] for i, j in other.items())
    assert sorted(other) == sorted(other.values()), "each scene is used once"
    assert set(range(len(cameras))) - set(other) == {
        i for i, camera in enumerate(cameras) if cameras.count(camera) == 1
    }
    assert other == other_scenes(cameras, seed)


def test_pairs_are_matched_by_name_whatever_the_suffix(tmp_path):
    write_pairs(tmp_path, ["b/2", "a/1"], scale=3)
    Image.open(tmp_path / "HR/a/1.png").save(tmp_path / "HR/a/1.bmp")
    (tmp_path / "HR/a/1.png").unlink()
    pairs, skipped = benchmark.find_pairs(tmp_path)
    assert [(p.name, p.scale, p.size) for p in pairs] == [
        ("a/1", 3, (48, 48)),
        ("b/2", 3, (48, 48)),
    ]
    assert pairs[0].hr.suffix == ".bmp" and skipped == 0


# Published sets: HR and LR files of a pair's name. RealVSR, and RealSR before version 3, store LR
# images at the HR size.
LAYOUTS = {
    "RealSR": (
        ("Canon_001", "Canon_002", "Nikon_001", "Nikon_002"),
        lambda n: f"{n[:5]}/Test/4/{n}_HR.png",
        lambda n: f"{n[:5]}/Test/4/{n}_LR4.png",
    ),
    "DRealSR": (
        ("Canon_10", "DSC_1045", "P1140122", "sony_2"),
        lambda n: f"Test_x4/test_HR/{n}_x4.png",
        lambda n: f"Test_x4/test_LR/{n}_x1.png",
    ),
    "RealVSR": (
        ("000_00000", "001_00000", "002_00000"),
        lambda n: f"GT_test/{n.replace('_', '/')}.png",
        lambda n: f"LQ_test/{n.replace('_', '/')}.png",
    ),
}


def write_published(folder, layout, hr_size=(201, 193), full=False):
    """A tiny set as published, with the HR images' own box average as LR; returns the names."""
    names, hr_of, lr_of = LAYOUTS[layout]
    if layout == "RealVSR":
        hr_size, full = (192, 128), True
    H, W = hr_size
    for number, name in enumerate(names):
        hr = photo(number, H, W)
        small = Image.fromarray(hr).resize((W // 4, H // 4), Image.Resampling.BOX)
        write(folder / hr_of(name), hr)
        stored = Image.fromarray(hr).filter(ImageFilter.BoxBlur(2)) if full else small
        write(folder / lr_of(name), np.asarray(stored))
    return names


@pytest.mark.parametrize(
    "layout, full, cameras",
    [
        ("RealSR", False, ["Canon", "Canon", "Nikon", "Nikon"]),
        ("RealSR", True, ["Canon", "Canon", "Nikon", "Nikon"]),
        ("DRealSR", False, ["Canon", "DSC", "P", "sony"]),
        ("RealVSR", True, ["", "", ""]),
    ],
)
def test_published_sets_are_read_as_they_are(tmp_path, layout, full, cameras):
    names = write_published(tmp_path, layout, full=full)
    _, hr_of, lr_of = LAYOUTS[layout]
    write(tmp_path / "Canon/Train/4/Canon_009_HR.png", photo(0, 192))  # is not to evaluate on
    for kind in ("GT", "LQ") if layout == "RealVSR" else ():  # another frame of the same scene
        write(tmp_path / f"{kind}_test/001/00001.png", photo(0, 192, 128))
    if layout == "DRealSR":
        write(
            tmp_path / "Test_x2/test_HR/Canon_3_x2.png", photo(0, 192)
        )  # the largest scale counts
    pairs, skipped = benchmark.find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == list(names) and skipped == 0
    assert [benchmark.camera_of(pair.name) for pair in pairs] == cameras
    for pair in pairs:
        h, w = (48, 32) if layout == "RealVSR" else (50, 48)
        assert (pair.size, pair.scale) == ((h, w), 4)
        hr, lr = benchmark.load_hr(pair), benchmark.load_lr(pair.lr, pair.shrink)
        assert hr.shape == (3, 4 * h, 4 * w) and lr.shape == (3, h, w)
        stored = Image.open(tmp_path / hr_of(pair.name)).crop((0, 0, 4 * w, 4 * h))
        np.testing.assert_array_equal(common.to_uint8(hr).permute(1, 2, 0), np.asarray(stored))
        stored = Image.open(tmp_path / lr_of(pair.name))
        if full:
            stored = stored.crop((0, 0, 4 * w, 4 * h)).resize((w, h), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(common.to_uint8(lr).permute(1, 2, 0), np.asarray(stored))


def test_the_scale_of_a_published_set_is_in_its_names(tmp_path):
    for file, size in (("HR", 99), ("LR3", 99)):
        write(tmp_path / f"Canon/Test/3/Canon_001_{file}.png", photo(1, size, size + 3))
    pair = benchmark.find_pairs(tmp_path)[0][0]
    assert (pair.name, pair.scale, pair.size, pair.shrink) == ("Canon_001", 3, (33, 34), 3)


def test_folders_of_pairs_may_be_links(tmp_path):
    write_pairs(tmp_path / "far", ["a1", "a2"])
    (tmp_path / "set").mkdir()
    for kind in ("HR", "LR"):
        (tmp_path / "set" / kind).symlink_to(tmp_path / "far" / kind)
    assert [pair.name for pair in benchmark.find_pairs(tmp_path / "set")[0]] == ["a1", "a2"]


@pytest.mark.parametrize(
    "hr, lr, names",
    [
        ("gt/{}.png", "lq/{}.png", ["a", "bx4"]),
        ("GT/{}.png", "LQ/{}.png", ["a", "bx4"]),
        ("hr/{}.png", "lr/{}x4.png", ["0001", "a/b", "cx2"]),
    ],
)
def test_pairs_are_known_as_others_lay_them_out(tmp_path, hr, lr, names):
    for number, name in enumerate(names):
        write(tmp_path / hr.format(name), photo(number, 192))
        write(tmp_path / lr.format(name), photo(number, 48))
    pairs, skipped = benchmark.find_pairs(tmp_path)
    assert [(pair.name, pair.scale) for pair in pairs] == [(name, 4) for name in names]
    assert [pair.lr for pair in pairs] == [tmp_path / lr.format(name) for name in names]
    assert skipped == 0


@pytest.mark.parametrize("turn", [3, 6])
def test_a_square_pair_of_which_exif_turns_one_image_is_skipped(tmp_path, turn):
    write_pairs(tmp_path, ["a1", "a2"])
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.open(tmp_path / "LR/a2.png").save(tmp_path / "LR/a2.png", exif=exif)
    pairs, skipped = benchmark.find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a1"] and skipped == 1


def test_a_corrupt_image_is_skipped_and_leaves_the_others_their_draws(tmp_path):
    write_pairs(tmp_path, ["a1", "a2", "a3"])
    (tmp_path / "HR/a2.png").write_bytes((tmp_path / "HR/a2.png").read_bytes()[:300])
    pairs, skipped = benchmark.find_pairs(tmp_path)
    assert [(p.index, p.name) for p in pairs] == [(0, "a1"), (2, "a3")] and skipped == 1


# ---- the methods --------------------------------------------------------------------------------


def batch_of(folder):
    pairs = benchmark.find_pairs(folder)[0]
    return pairs, torch.stack([common.load_image(pair.hr) for pair in pairs])


def test_bicubic_is_pillows(tmp_path):
    pairs, hr = batch_of(write_pairs(tmp_path))
    lr = benchmark.bicubic(hr, pairs)
    for pair, image in zip(pairs, lr, strict=True):
        expected = Image.open(pair.hr).resize((48, 48), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal((image * 255).permute(1, 2, 0), np.asarray(expected))


def test_synthetic_lr_depends_on_seed_and_index_not_on_the_batch(tmp_path):
    pairs, hr = batch_of(write_pairs(tmp_path))
    lr = benchmark.synthetic(hr, pairs, "realesrgan", seed=3)
    assert torch.equal(lr[2:4], benchmark.synthetic(hr[2:4], pairs[2:4], "realesrgan", seed=3))
    assert not torch.equal(lr, benchmark.synthetic(hr, pairs, "realesrgan", seed=4))
    moved = [replace(pair, index=pair.index + 1) for pair in pairs]
    assert not torch.equal(lr, benchmark.synthetic(hr, moved, "realesrgan", seed=3))


# ---- the table ----------------------------------------------------------------------------------


@pytest.fixture
def copying_generator(monkeypatch):
    """A generator that answers with the reference, resized: shows what it was given."""
    calls = []

    def answer(net, hr, lr_ref, sampler, seeds):
        settings = {f.name: getattr(sampler, f.name) for f in fields(generate.Sampler)}
        calls.append(settings | {"seeds": seeds})
        size = (hr.shape[2] // 4, hr.shape[3] // 4)
        lr = torch.stack([torch.nn.functional.interpolate(x[None], size)[0] for x in lr_ref])
        candidates = torch.stack([torch.zeros_like(lr)] * (sampler.candidates - 1) + [lr], dim=1)
        return candidates, {"kept": torch.full((len(hr),), candidates.shape[1] - 1)}

    monkeypatch.setattr(generate, "load_generator", lambda *_: SimpleNamespace(t_max=500))
    monkeypatch.setattr(generate, "generate", answer)
    own = lambda pairs, net: {p.index: benchmark.load_lr(p.lr, p.shrink) for p in pairs}  # noqa: E731
    monkeypatch.setattr(benchmark, "mean_codes", own)
    return calls


def run_table(tmp_path, folder, **options):
    cfg = benchmark.Config(
        pairs=(str(folder),),
        out=str(tmp_path / "out"),
        device="cpu",
        t_start=9,
        candidates=2,
        **options,
    )
    benchmark.main(cfg, common.Runtime(torch.device("cpu")))
    results = json.loads((tmp_path / "out/results.json").read_text())
    table = f"{cfg.table[0]}.md" if cfg.table else "table2.md"
    return results, (tmp_path / "out" / table).read_text()


def test_the_table_has_each_method_and_every_value(tmp_path, monkeypatch, copying_generator):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    results, table = run_table(
        tmp_path, write_pairs(tmp_path / "RealSR"), batch_size=2, start="realesrgan"
    )
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    counts = {name: row["n"] for name, row in rows.items()}
    assert counts == {
        "bicubic": 5,
        "Real-ESRGAN": 5,
        "BSRGAN": 5,
        "best blur of the set*": 5,
        "best blur of each pair*": 5,
        "RealDGen T=0, own LR": 5,
        "RealDGen T=0, other scene": 4,
        "RealDGen T=0, all other scenes": 4,
        "RealDGen, own LR": 5,
        "RealDGen, other scene": 4,
        "RealDGen, all other scenes": 4,
    }
    # The kept candidate is the reference: the own LR is the answer itself, another scene is not.
    for t in (" T=0", ""):
        assert rows[f"RealDGen{t}, own LR"]["mean"]["PSNR RGB"] == 100
        other = rows[f"RealDGen{t}, other scene"]
        assert set(other["images"]) == {"Canon_1", "Canon_2", "Nikon_1", "Nikon_2"}
        first, second = (common.load_image(tmp_path / f"RealSR/LR/Canon_{i}.png") for i in (1, 2))
        expected = -10 * math.log10((first - second).square().mean())
        assert other["images"]["Canon_1"]["PSNR RGB"] == pytest.approx(expected, abs=1e-4)
    values = [image["SSIM Y"] for image in rows["bicubic"]["images"].values()]
    assert rows["bicubic"]["mean"]["SSIM Y"] == pytest.approx(np.mean(values))
    means = [rows[name]["mean"]["PSNR RGB"] for name in (*counts,)[:5]]
    # Blurs chosen by looking at the answer. (No blur: antialiased by the same filter as Pillow's.)
    assert means[4] >= means[3] > means[0] - 0.1
    # T = 0 is Rec_lr alone, whatever diffusion starts from.
    starts = {call["t_start"]: call["start"] for call in copying_generator}
    assert starts == {0: "reconstruct", 9: "realesrgan"}
    assert results["config"]["batch_size"] == 2 and results["torch"] == torch.__version__
    # No weights: no number, neither in the table nor in the file.
    assert "LPIPS" not in rows["bicubic"]["mean"] and "| - | - | 5 |" in table
    assert "left out there: 1." in table and "Canon 2, Nikon 2, Sony 1" in table
    assert [line for line in table.splitlines() if "26.16" in line][0].startswith(
        "RealDGen (paper)"
    )


def test_results_do_not_depend_on_batch_size(tmp_path, monkeypatch, copying_generator):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    folder = write_pairs(tmp_path / "mine")
    write(folder / "HR/Canon_3.png", photo(7, 256))  # of another size, so that batches are broken
    write(folder / "LR/Canon_3.png", photo(7, 64))
    images = []
    for batch_size in (1, 4):
        results, table = run_table(tmp_path, folder, batch_size=batch_size)
        images.append([row["images"] for row in results["sets"][0]["rows"]])
    assert images[0] == images[1] and len(images[0][0]) == 6
    seeds = {s for call in copying_generator if call["t_start"] for s in call["seeds"]}
    assert len(seeds) == 6
    assert "paper" not in table


def test_set_metrics_see_every_image_once_and_in_pairs(tmp_path, monkeypatch, copying_generator):
    def difference(a, b):
        return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))

    monkeypatch.setitem(benchmark.SET_METRICS, "FID", difference)
    monkeypatch.setitem(benchmark.SET_METRICS, "KID", lambda a, b: sum(len(x) for x in [*a, *b]))
    monkeypatch.setattr(benchmark, "available_metrics", lambda device: ["PSNR Y", "FID", "KID"])
    results, table = run_table(tmp_path, write_pairs(tmp_path / "mine"), batch_size=2)
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    assert rows["bicubic"]["mean"]["KID"] == 10
    assert rows["RealDGen, other scene"]["mean"]["KID"] == 8
    assert rows["RealDGen, own LR"]["mean"]["FID"] == 0 < rows["bicubic"]["mean"]["FID"]
    assert set(rows["bicubic"]["images"]["Canon_1"]) == {"PSNR Y"}
    assert "| 0.00 | 10.0000 | - | 5 |" in table and "FID is too large for so few" in table


def test_sampling_compares_settings_on_the_same_pairs(tmp_path, monkeypatch, copying_generator):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    folder = write_pairs(tmp_path / "RealSR")
    results, text = run_table(tmp_path, folder, table=("sampling",), images=3, t_starts=(0, 7))
    rows = results["sampling"][0]["rows"]
    assert len(rows) == 11 and all(row["n"] == 3 for row in rows) and results["sets"] == []
    used = {(c["t_start"], c["num_steps"], c["eta"], c["candidates"], c["start"])
            for c in copying_generator}  # fmt: skip
    assert {(7, 10, 0.0, 1, "reconstruct"), (7, 7, 1.0, 1, "reconstruct"),
            (9, benchmark.Config.num_steps, 0.0, 4, "reconstruct"),
            (300, 300, 1.0, 1, "reconstruct"),
            (300, 300, 1.0, 1, "realesrgan")} <= used  # fmt: skip
    assert [c["grain"] for c in copying_generator if c["t_start"] == 0] == [False, True]
    assert "T=7, ddim, 5" in text and "images/s" in text


def test_scale_2_reaches_the_generator_at_4_times_the_lr_size(
    tmp_path, monkeypatch, copying_generator
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    results, _ = run_table(tmp_path, write_pairs(tmp_path / "x2", ["a1", "a2"], scale=2))
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    assert all(row["n"] == 2 for row in rows.values())
    assert rows["RealDGen T=0, own LR"]["mean"]["PSNR Y"] == 100


def test_lr_stored_at_the_hr_size_is_shrunk_as_answer_and_as_reference(
    tmp_path, monkeypatch, copying_generator
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    write_published(tmp_path / "RealSR", "RealSR", full=True)
    results, table = run_table(tmp_path, tmp_path / "RealSR", batch_size=3)
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    assert {row["n"] for row in rows.values()} == {4} and "Canon 2, Nikon 2" in table
    assert rows["RealDGen, own LR"]["mean"]["PSNR RGB"] == 100
    assert 30 < rows["bicubic"]["mean"]["PSNR RGB"] < 100
    assert rows["RealDGen, other scene"]["mean"]["PSNR RGB"] < 20


@pytest.mark.parametrize("name", ["RealSR", "DRealSR"])
def test_bicubic_rows_of_the_shared_pairs_are_reproduced_without_our_code(shared, name):
    """As `python tests/bicubic_rows.py`, for those who would rather see the numbers."""
    expected = bicubic_rows.rows(shared / "photos/pairs" / name)
    pairs = benchmark.find_pairs(shared / "photos/pairs" / name)[0]
    assert len(pairs) > 40
    facts = pairs, [*bicubic_rows.COLUMNS]
    cpu = torch.device("cpu")
    larger = functools.partial(downstream.super_resolved, net=None, bf16=False)
    found = {
        "bicubic": benchmark.evaluate("a", benchmark.bicubic, *facts, 8, cpu),
        "bicubic enlargement": benchmark.evaluate("b", larger, *facts, 1, cpu, True),
    }
    for row, values in expected.items():
        mean = [found[row]["mean"][column] for column in bicubic_rows.COLUMNS]
        np.testing.assert_allclose(mean[:2], values[:2], atol=0.01)  # dB
        np.testing.assert_allclose(mean[2:], values[2:], atol=0.001)


def test_the_mean_code_is_that_of_the_other_scenes_of_the_camera(tmp_path, monkeypatch):
    pairs, _ = benchmark.find_pairs(write_pairs(tmp_path / "set", ["a1", "a2", "a3", "b1"]))
    monkeypatch.setattr(generate, "code_of", lambda net, lr: lr.mean((1, 2))[None])
    codes = benchmark.mean_codes(pairs, torch.nn.Linear(1, 1))
    means = [common.load_image(pair.lr).mean((1, 2)) for pair in pairs]
    assert set(codes) == {0, 1, 2}  # there is no other b
    torch.testing.assert_close(codes[1], (means[0] + means[2]) / 2)


# ---- the command line ---------------------------------------------------------------------------


def test_the_sampler_and_its_presets_serve_here_too():
    """The same settings, with the same defaults, in both commands; not only the same names."""
    for preset in benchmark.PRESETS:
        here, there = (of.Config(**of.PRESETS[preset]) for of in (benchmark, generate))
        for field in fields(generate.Sampler):
            assert getattr(here, field.name) == getattr(there, field.name)


def unequal_names(folder):
    (folder / "LR/Canon_1.png").rename(folder / "LR/Canon_7.png")


def unequal_scales(folder):
    write(folder / "HR/Canon_2.png", photo(0, 96))


def fractional_scale(folder):
    write(folder / "HR/Canon_1.png", photo(0, 200))


def no_lr(folder):
    (folder / "LR").rename(folder / "elsewhere")


def empty_hr(folder):
    for file in (folder / "HR").iterdir():
        file.unlink()


def all_corrupt(folder):
    for file in (folder / "LR").iterdir():
        file.write_bytes(b"")


def tiny(folder):
    write(folder / "HR/Canon_1.png", photo(0, 64))
    write(folder / "LR/Canon_1.png", photo(0, 16))


def same_stem_twice(folder):
    write(folder / "LR/Canon_1.bmp", photo(0, 48))


def published(folder):
    """Each published set with one mistake in it."""
    for name in LAYOUTS:
        write_published(folder.parent / name, name)
    write(folder.parent / "RealSR/Nikon/Test/4/Nikon_002_LR4.png", photo(0, 50, 47))
    (folder.parent / "DRealSR/Test_x4/test_LR/DSC_1045_x1.png").unlink()
    write(folder.parent / "RealVSR/LQ_test/001/00000.png", photo(0, 48, 32))


def other_network(folder):
    state = {"ema": {}, "config": {"sr": "hat", "scale": 4}}
    torch.save(state, folder.parent / "hat.pt")


def nothing(folder):
    pass


@pytest.mark.parametrize(
    "spoil, options, sentence",
    [
        (nothing, "", "--pairs is missing"),
        (nothing, "--pairs nowhere", "--pairs nowhere: no such folder"),
        (nothing, "--pairs set/HR", "no images as HR/ and LR/ with the same names, or RealSR"),
        (no_lr, "--pairs set", "2 HR and 0 LR images; 2 names are of one kind only"),
        (empty_hr, "--pairs set", "0 HR and 2 LR images"),
        (
            unequal_names,
            "--pairs set",
            "2 HR and 2 LR images; 2 names are of one kind only, such as Canon_1, Canon_7",
        ),
        (unequal_scales, "--pairs set", "96 x 96 HR and 48 x 48 LR pixels, not 24 x 24 as scale 4"),
        (fractional_scale, "--pairs set", "200 x 200 HR and 48 x 48 LR pixels, not 50 x 50"),
        (published, "--pairs RealSR", "Nikon_002 has 193 x 201 HR and 47 x 50 LR pixels, not 48 x"),
        (published, "--pairs DRealSR", "4 HR and 3 LR images; 1 names are of one kind only"),
        (published, "--pairs RealVSR", "128 x 192 HR and 32 x 48 LR pixels, not 128 x 192 as sc"),
        (tiny, "--pairs set", "under 32 x 32"),
        (same_stem_twice, "--pairs set", "LR/Canon_1.png: set/LR/Canon_1.bmp has the same name"),
        (all_corrupt, "--pairs set", "none of its pairs can be read"),
        (nothing, "--pairs set --table 9", "choose among 1, 2, 3, 4, 5, 6, 7, sampling, fac"),
        (nothing, "--table 2 factors", "--pairs is missing"),
        (nothing, "--table 1 6", "--pairs is missing"),
        (nothing, "--sr srcnn", "--sr srcnn: choose among swinir, swinir-l, rrdb, hat, fsrcnn"),
        (nothing, "--sr fsrcnn --data real", "--data real: choose among bicubic, bsrgan"),
        (nothing, "--sr fsrcnn --sr-preset tiny", "--sr-preset tiny: choose among small, paper"),
        (nothing, "--sr fsrcnn --seeds 0", "must be at least 1"),
        (nothing, "--sr fsrcnn --pairs set --hr nowhere", "--hr nowhere: no such file or folder"),
        (nothing, "--sr fsrcnn --pairs set --lr-ref nowhere", "--lr-ref nowhere: no such file or"),
        (nothing, "--sr fsrcnn --pairs set ./set", "two folders have the same name"),
        (nothing, "--sr fsrcnn --syndiff no.pt", "--syndiff no.pt: no such file"),
        (nothing, "--sr fsrcnn --sr-start-from no.pt", "--sr-start-from no.pt: no such file"),
        (nothing, f"--sr fsrcnn --sr-start-from {SHIPPED}", "not a network of sr.py"),
        (other_network, "--sr fsrcnn --sr-start-from hat.pt", "hat.pt: a hat, which --sr does not"),
        (nothing, "--table 4 --without-content no.pt", "--without-content no.pt: no such file"),
        (nothing, "--table factors --hr nowhere", "--hr nowhere: no such file or folder"),
        (nothing, "--table factors --hr set/LR --crop 32", "0 are photos of 128 x 128"),
        (nothing, "--table factors --crop 60", "must be a multiple of 8"),
        (nothing, "--table figure1 --hr set/LR --crop 32", "0 are photos of 128 x 128"),
        (nothing, "--table figure1 --blurs 0.3 -1", "--blurs -1.0: must be at least 0"),
        (nothing, "--table figure1 --noises -1", "--noises -1.0: must be at least 0"),
        (nothing, "--table extractors --extractors no.pt", "--extractors no.pt: no such file"),
        (nothing, "--table extractors --hr set/HR --crop 32 --lr nowhere", "--lr nowhere: no such"),
        (nothing, "--pairs set --batch-size 0", "must be at least 1"),
        (nothing, "--pairs set --start noise", "--start noise: choose reconstruct, realesr"),
        (nothing, "--pairs set --eta 2", "--eta 2"),
        (nothing, "--pairs set --t-start 900", "T = 900: the weights know 500 steps"),
        (nothing, "--pairs set --sr fsrcnn --table 3 --t-starts 200 501", "T = 501: the weights"),
        (nothing, "--pairs set --checkpoint no.pt", "no such file"),
        (nothing, "--pairs set --sr fsrcnn --checkpoint no.pt", "no such file"),
        (nothing, f"--pairs set --sr fsrcnn --syndiff {STAGE_1}", "not a checkpoint of diffusion"),
        (nothing, "--pairs set --sr fsrcnn --average 0", "--average 0: must be in 1"),
        (nothing, "--sr fsrcnn --perceptual-weight -1", "must be at least 0"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, spoil, options, sentence):
    spoil(write_pairs(tmp_path / "set", ["Canon_1", "Canon_2"]) and tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, str(ROOT / "benchmark.py"), "--device", "cpu", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr
    assert sorted(tmp_path.rglob("*")) == before

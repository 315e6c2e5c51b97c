"""SR networks trained on each method's data: what they are tested on, and what the tables say."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmark import photo, write, write_pairs

import benchmark
import common
import generate
from bench import downstream, pairs, sr


@pytest.fixture
def table_1(tmp_path, monkeypatch):
    """Table 1 in miniature, whose RealDGen writes bicubic pairs; its results, and its settings."""
    calls = []

    def main(cfg, rt):
        calls.append(cfg)
        for file in common.list_images(list(cfg.hr), "--hr"):
            hr = common.load_image(file)
            h, w = (side // 4 for side in hr.shape[1:])
            common.save_image(Path(cfg.out) / "hr" / f"{file.stem}.png", hr)
            lr = pairs.reduced(hr[None], h, w)[0]
            common.save_image(Path(cfg.out) / "lr" / f"{file.stem}.png", lr)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(generate, "main", main)
    write_pairs(tmp_path / "RealSR")
    write(tmp_path / "photos" / "x.png", photo(3, 192))
    cfg = benchmark.Config(
        pairs=(str(tmp_path / "RealSR"),),
        hr=(str(tmp_path / "photos"),),
        out=str(tmp_path / "out"),
        device="cpu",
        sr=("fsrcnn",),
        sr_preset="smoke",
        sr_steps=3,
        seeds=2,
        data=("bicubic", "realdgen", "paired"),
    )
    benchmark.main(cfg, common.Runtime(torch.device("cpu")))
    return tmp_path / "out", json.loads((tmp_path / "out/results.json").read_text()), calls


def test_networks_are_tested_on_pairs_that_gave_no_reference(table_1):
    out, results, calls = table_1
    kept = next((out / "sets").iterdir())
    references = {file.stem for file in (kept / "references").rglob("*.png")}
    assert references == {"Canon_1", "Nikon_1", "Sony_1"}
    assert [cfg.lr_ref for cfg in calls] == [(str(kept / "references" / "RealSR"),)]
    for kind in ("hr", "lr"):
        names = {file.stem for file in (kept / "paired" / kind).iterdir()}
        assert names == {f"RealSR_{name}" for name in references}
    rows = results["downstream"][0]["rows"]
    assert [row["label"] for row in rows] == [
        "bicubic enlargement",
        "bicubic",
        "RealDGen",
        "real pairs (oracle)",
    ]
    for row in rows:
        runs = row["sets"]["RealSR"]
        assert len(runs) == (2 if row["data"] else 1)
        assert all(set(run["images"]) == {"Canon_2", "Nikon_2"} for run in runs)
    # The enlargement is Pillow's, and it is compared with the HR image.
    lr, hr = (Image.open(out.parent / f"RealSR/{kind}/Canon_2.png") for kind in ("LR", "HR"))
    large = np.asarray(lr.resize(hr.size, Image.Resampling.BICUBIC), float)
    expected = -10 * np.log10(((large - np.asarray(hr, float)) ** 2).mean() / 255**2)
    value = rows[0]["sets"]["RealSR"][0]["images"]["Canon_2"]["PSNR RGB"]
    assert value == pytest.approx(expected, abs=0.01)


def test_the_downstream_table_has_spread_cost_and_latex(table_1):
    out, results, _ = table_1
    text = (out / "table1.md").read_text()
    runs = results["downstream"][0]["rows"][2]["sets"]["RealSR"]
    values = [run["mean"]["PSNR Y"] for run in runs]
    assert values[0] != values[1]  # seeds differ
    assert f"{np.mean(values):.2f} ± {np.std(values):.2f}" in text
    assert "Tested on every other pair of each camera (RealSR 2)" in text
    tex = (out / "table1.tex").read_text()
    assert tex.count(r"\begin{tabular}{lrrrrrr}") == tex.count(r"\begin{tabular}{lrrrrrrrr}") == 1
    assert tex.count(r"\end{tabular}") == 2
    assert r"$\pm$" in tex and tex.count(r"\\") == 5 + 4
    assert len(list(out.glob("sets/*/sr/*.safetensors"))) == 6


def test_every_training_and_every_generation_has_its_cost(table_1):
    out, results, _ = table_1
    for row in results["downstream"][0]["rows"][1:]:
        assert len(row["training"]) == 2  # seeds
        for cost in row["training"]:
            assert cost["parameters"] == sum(
                p.numel() for p in sr.sr_network("fsrcnn").parameters()
            )
            assert cost["seconds"] > 0 and cost["memory"] > 2**26  # torch alone takes more
        assert bool(row["generation"]) == (row["data"] == "realdgen")
    made = results["downstream"][0]["rows"][2]["generation"]
    net = generate.load_generator("", torch.device("cpu"))
    assert made["parameters"] == sum(p.numel() for p in net.parameters()) and made["pairs"] == 1
    lines = (out / "table1.md").read_text().splitlines()
    cost = [line.split("|") for line in lines if "MiB" in line]
    assert [cells[2].strip() for cells in cost] == ["bicubic", "RealDGen", "real pairs (oracle)"]
    assert [cells[6].strip() == "-" for cells in cost] == [True, False, True]
    assert any("peak RSS of the whole process" in line for line in lines)


def test_the_cost_of_a_block_is_its_own_memory_and_time():
    with downstream.measured(torch.device("cpu")) as small:
        pass
    with downstream.measured(torch.device("cpu")) as large:
        torch.zeros(2**26).add_(1)  # 256 MiB
    assert large["seconds"] > small["seconds"] >= 0 and large["memory"] >= small["memory"]
    if os.access("/proc/self/clear_refs", os.W_OK):  # elsewhere an earlier peak may be higher
        assert large["memory"] > small["memory"] + 2**27


def test_a_network_goes_on_from_the_weights_of_its_kind(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.safetensors" for name in ("fsrcnn", "swinir-l")]
    for file in files:
        sr.save_network(file, sr.sr_network(file.stem), sr.Config(sr=file.stem))
    begun = []
    monkeypatch.setattr(sr, "train", lambda cfg, rt: begun.append(cfg.start_from) or files[0])
    cfg = benchmark.Config(sr_preset="smoke", sr_start_from=tuple(map(str, files[1:])))
    for network in ("fsrcnn", "swinir-l"):
        rt = common.Runtime(torch.device("cpu"))
        downstream.train_network(network, {"recipe": "light"}, "a", 0, cfg, rt)
    assert begun == ["", str(files[1])]


def test_the_papers_values_stand_in_their_places():
    assert downstream.paper_value("hat", "bsrgan", False, "DRealSR", "PSNR Y") == " [28.135]"
    assert downstream.paper_value("swinir", "realdgen", True, "RealSR", "FID") == " [69.736]"
    assert downstream.paper_value("swinir-l", "syndiff", True, "DRealSR", "LPIPS") == " [.3748]"
    for nothing in (
        ("fsrcnn", "bsrgan", False, "RealSR", "PSNR Y"),
        ("hat", "bsrgan", True, "RealSR", "PSNR Y"),
        ("hat", "bsrgan", False, "mine", "PSNR Y"),
    ):
        assert downstream.paper_value(*nothing) == ""


def test_every_table_has_its_rows():
    cfg = benchmark.Config(sr=("hat", "fsrcnn"), t_starts=(200, 300), without_content="c.pt")
    rows = {t: downstream.downstream_rows(t, ["A", "B"], cfg) for t in downstream.DOWNSTREAM}
    assert len(rows["1"]) == 2 * len(downstream.DATA)
    assert [r.settings for r in rows["3"]] == [{"t_start": 200}, {"t_start": 300}]
    assert [r.settings for r in rows["7"]] == [{"candidates": 1}, {"candidates": 4}]
    # An ablation gets nothing of what it is without by another way: Rec_lr's answer, grain.
    noised = {"start": "realesrgan", "grain": False, "t_start": 300, "num_steps": 10}
    assert [r.settings for r in rows["4"]] == [noised | {"checkpoint": "c.pt"}, noised]
    assert [r.without for r in rows["5"]][-2:] == ["A", "B"]
    assert {r.network for t in "3457" for r in rows[t]} == {"fsrcnn"}
    given = replace(cfg, lr_ref=("mine",))  # of which none can be left out
    assert not any(r.without for r in downstream.downstream_rows("5", ["A", "B"], given))


def test_what_was_made_of_other_pairs_weights_or_settings_is_not_taken_up(tmp_path):
    folder = tmp_path / "RealSR"
    write_pairs(folder, ["Canon_2", "Canon_3", "Canon_4"])
    write(tmp_path / "photos" / "x.png", photo(3, 192))
    weights = Path(generate.__file__).parent / "data/pretrained"
    cfg = benchmark.Config(
        hr=(str(tmp_path / "photos"),),
        sr_preset="smoke",
        checkpoint=str(weights / "diffusion.safetensors"),
    )

    def key(**changes: object) -> str:
        return downstream.key_of({"RealSR": pairs.find_pairs(folder)[0]}, replace(cfg, **changes))

    keys = [
        key(),
        key(t_start=7),
        key(sr_steps=9),
        key(seed=1),
        key(lr_ref=("mine",)),
        key(syndiff=str(weights / "extractors.safetensors")),
        key(checkpoint=str(weights / "extractors.safetensors")),
    ]
    assert key(seeds=3) == keys[0]
    write(tmp_path / "photos" / "y.png", photo(4, 192))
    keys.append(key())
    write_pairs(folder, ["Canon_1"])  # from now on Canon_1 and 3 are references, not 2 and 4
    keys.append(key())
    assert len(set(keys)) == len(keys)

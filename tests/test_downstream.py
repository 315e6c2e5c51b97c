"""bench/downstream.py: what SR networks are trained and tested on, and what the tables say."""

import mmap
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from drawn import inputs_of, photo, write, write_pairs
from PIL import Image

import generate
from bench import downstream, pairs, sr
from bench.inputs import SOURCES, Config
from common.checkpoint import save_weights
from common.files import list_images
from common.images import load_image, save_image
from tests.tiny import CPU

SHIPPED = Path(generate.__file__).parent / "data/pretrained"


def small_inputs(tmp_path, **flags):
    given = {"pairs": (str(tmp_path / "RealSR"),), "hr": (str(tmp_path / "photos"),),
             "out": str(tmp_path / "out"), "sr_steps": 3, "device": "cpu"}  # fmt: skip
    return inputs_of(**given | flags)


@pytest.fixture
def table_1(tmp_path, monkeypatch, no_metric_weights):
    """A small Table 1, whose RealDGen writes bicubic pairs; values, text, configs of generate."""
    configs = []

    def fake_main(cfg, rt):
        configs.append(cfg)
        for file in list_images(list(cfg.hr), "--hr"):
            hr = load_image(file)
            save_image(Path(cfg.out) / "hr" / f"{file.stem}.png", hr)
            lr = pairs.resized_by_pillow(hr[None], *(side // 4 for side in hr.shape[1:]))[0]
            save_image(Path(cfg.out) / "lr" / f"{file.stem}.png", lr)

    monkeypatch.setattr(generate, "main", fake_main)
    write_pairs(tmp_path / "RealSR")
    write(tmp_path / "photos" / "x.png", photo(3, 192))
    inputs = small_inputs(tmp_path, seeds=2, data=("bicubic", "realdgen", "paired"))
    values, text = downstream.table_downstream("1", inputs)()
    return values, text, configs


def test_networks_are_tested_on_pairs_that_gave_no_reference(table_1, tmp_path):
    values, _, configs = table_1
    folder = next((tmp_path / "out/sets").iterdir())
    references = {file.stem for file in (folder / "references").rglob("*.png")}
    assert references == {"Canon_1", "Nikon_1", "Sony_1"}
    assert [cfg.lr_ref for cfg in configs] == [(str(folder / "references" / "RealSR"),)]
    for kind in ("hr", "lr"):
        names = {file.stem for file in (folder / "paired" / kind).iterdir()}
        assert names == {f"RealSR_{name}" for name in references}
    labels = [row["label"] for row in values["rows"]]
    assert labels == ["bicubic enlargement", "bicubic", "RealDGen", "real pairs (oracle)"]
    for row in values["rows"]:
        assert len(row["runs"]) == (2 if row["data"] else 1)
        assert all(set(run["RealSR"]["images"]) == {"Canon_2", "Nikon_2"} for run in row["runs"])
    # The enlargement is Pillow's, and it is compared with the HR image.
    lr, hr = (Image.open(tmp_path / f"RealSR/{kind}/Canon_2.png") for kind in ("LR", "HR"))
    large = np.asarray(lr.resize(hr.size, Image.Resampling.BICUBIC), float)
    expected = -10 * np.log10(((large - np.asarray(hr, float)) ** 2).mean() / 255**2)
    value = values["rows"][0]["runs"][0]["RealSR"]["images"]["Canon_2"]["PSNR RGB"]
    assert value == pytest.approx(expected, abs=0.01)


def test_the_table_has_spread_and_what_each_training_and_generation_cost(table_1, tmp_path):
    values, text, _ = table_1
    psnr = [run["RealSR"]["mean"]["PSNR Y"] for run in values["rows"][2]["runs"]]
    assert psnr[0] != psnr[1]  # seeds differ
    assert f"{np.mean(psnr):.2f} ± {np.std(psnr):.2f}" in text
    split = "RealSR: references are of every other scene (3), tested are the others (2)."
    assert split in text and "In brackets" not in text, "a folder's name makes it no benchmark"
    assert (
        text.count("(only 3 steps: means nothing)") == 3 and "--sr fsrcnn --sr-steps 2000" in text
    )
    for row in values["rows"][1:]:
        for cost in row["training"]:
            parameters = sum(p.numel() for p in sr.sr_network("fsrcnn").parameters())
            assert cost["parameters"] == parameters
            assert cost["seconds"] > 0 and cost["memory"] > 2**26  # torch alone takes more
        assert bool(row["generation"]) == (row["data"] == "realdgen")
    assert len(list(tmp_path.glob("out/sets/*/sr/*.safetensors"))) == 6


def test_the_cost_of_a_block_is_its_own_memory_and_time():
    with downstream.measured(CPU.device) as small:
        pass
    with downstream.measured(CPU.device) as large:
        with mmap.mmap(-1, 2**28) as pages:  # not malloc, which may hold freed memory
            for at in range(0, len(pages), mmap.PAGESIZE):
                pages[at] = 1
    assert large["seconds"] > small["seconds"] >= 0 and large["memory"] >= small["memory"]
    if os.access("/proc/self/clear_refs", os.W_OK):  # elsewhere an earlier peak may be higher
        assert large["memory"] > small["memory"] + 2**27


def test_a_network_starts_from_the_weights_of_its_kind(tmp_path, monkeypatch):
    files = [tmp_path / f"{name}.safetensors" for name in ("fsrcnn", "swinir-l")]
    for file in files:
        weights = sr.sr_network(file.stem).state_dict()
        save_weights(file, weights, config=asdict(sr.Config(sr=file.stem)))
    begun = []
    monkeypatch.setattr(sr, "train", lambda cfg, rt: begun.append(cfg.start_from) or files[0])
    inputs = small_inputs(tmp_path, sr_start_from=(str(files[1]),))
    for network in ("fsrcnn", "swinir-l"):
        downstream.train_network(network, {"recipe": "light"}, "a", 0, tmp_path, inputs)
    assert begun == ["", str(files[1])]


def test_the_papers_values_stand_in_their_places():
    def value(table, network, data, perceptual, release, metric, without=""):
        row = asdict(downstream.Row("", network, data, {}, perceptual, without))
        return downstream.paper_value(table, row, release, metric)

    assert value("1", "hat", "bsrgan", False, "DRealSR", "PSNR Y") == " [28.135]"
    assert value("1", "swinir", "realdgen", True, "RealSR", "FID") == " [69.736]"
    assert value("5", "swinir-l", "realdgen", False, "RealVSR", "SSIM Y") == " [.6994]"
    for nothing in (
        ("1", "fsrcnn", "bsrgan", False, "RealSR", "PSNR Y"),
        ("1", "hat", "bsrgan", True, "RealSR", "PSNR Y"),
        ("1", "hat", "bsrgan", False, "", "PSNR Y"),
        ("3", "swinir-l", "realdgen", False, "RealSR", "PSNR Y"),
        ("5", "swinir-l", "realdgen", False, "RealSR", "PSNR Y"),
        ("5", "swinir-l", "realdgen", True, "RealVSR", "LPIPS"),
        ("5", "swinir-l", "realdgen", False, "RealVSR", "PSNR Y", "A"),
    ):
        assert value(*nothing) == ""


def test_every_table_has_its_rows():
    cfg = Config(sr=("hat", "fsrcnn"))
    rows = {t: downstream.rows_of(t, cfg, ["A", "B"]) for t in "13457"}
    assert len(rows["1"]) == 2 * len(SOURCES)
    assert [r.settings for r in rows["3"]] == [
        {"t_start": T, "num_steps": 10} for T in (200, 300, 400, 500)
    ]
    assert [r.settings for r in rows["7"]] == [{"candidates": 1}, {"candidates": 4}]
    # Of Table 4 nothing differs but the weights.
    weights = [row.settings.pop("checkpoint") for row in rows["4"]]
    names = ("no_degradation", "no_content", "frozen", "as-printed/diffusion")
    assert weights == [f"runs/{name}/last.pt" for name in names]
    paper = generate.PRESETS["paper"] | {"candidates": 1, "num_steps": 10}
    assert [row.settings for row in rows["4"]] == [paper] * 4
    assert [r.without for r in rows["5"]][-2:] == ["A", "B"]
    assert {r.network for t in "3457" for r in rows[t]} == {"fsrcnn"}
    # In the preset paper every step is evaluated.
    cfg = Config(sr=("fsrcnn",), num_steps=300, t_starts=(400,))
    assert downstream.rows_of("3", cfg, [])[0].settings == {"t_start": 400, "num_steps": 400}
    assert downstream.rows_of("4", cfg, [])[0].settings["num_steps"] == 300


def test_rows_with_equal_values_of_different_settings_have_folders_of_their_own(
    tmp_path, monkeypatch
):
    """T=4 of Table 3 and K=4 of Table 7: once both wrote to realdgen_4."""
    write_pairs(tmp_path / "RealSR")
    write(tmp_path / "photos/x.png", photo(3, 192))
    inputs, outs = small_inputs(tmp_path, t_starts=(1, 4)), []
    monkeypatch.setattr(generate, "main", lambda cfg, rt: outs.append(cfg.out))
    for table in "37":
        for row in downstream.rows_of(table, inputs.cfg, ["RealSR"]):
            downstream.training_source(row, tmp_path, inputs)
    assert len(outs) == len(set(outs)) == 4


def test_what_was_made_of_other_photos_weights_or_settings_is_not_used_again(tmp_path):
    write_pairs(tmp_path / "RealSR", ["Canon_2", "Canon_3", "Canon_4"])
    write(tmp_path / "photos/x.png", photo(3, 192))
    shipped = str(SHIPPED / "diffusion.safetensors")

    def key(**flags):
        return downstream.folder_of(small_inputs(tmp_path, checkpoint=shipped, **flags))

    keys = [key(), key(t_start=7), key(seed=1), key(start="light")]
    assert key(seeds=3) == keys[0]
    (tmp_path / "photos/x.png").rename(tmp_path / "photos/y.png")
    assert key() == keys[0], "photos count by their content"
    write(tmp_path / "photos/y.png", photo(4, 192))
    keys.append(key())
    write(tmp_path / "RealSR/LR/Canon_3.png", photo(9, 48))
    assert key() == keys[-1], "nothing is made of the pairs that are tested"
    write(tmp_path / "RealSR/LR/Canon_4.png", photo(9, 48))
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_steps_of_one_network_do_not_depend_on_another(tmp_path):
    alone, both = (small_inputs(tmp_path, sr=sr, sr_steps=0).cfg
                   for sr in (("fsrcnn",), ("fsrcnn", "swinir")))  # fmt: skip
    steps = sr.PRESETS["smoke"]["steps"]
    assert downstream.steps_of("fsrcnn", alone) == downstream.steps_of("fsrcnn", both) == steps
    assert downstream.steps_of("swinir", both) < steps
    assert downstream.steps_of("swinir", replace(both, sr_preset="paper")) == sr.Config.steps

"""bench/pictures.py: which crops are shown, what the pictures hold, and their command."""

import json
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from drawn import bicubic_for_realdgen, scenes, write_pairs

import generate
from bench import pictures, sr
from common.images import load_image, save_image
from tests.tiny import uniform

CROP, SHOWN = pictures.CROP, pictures.SHOWN
TINY = "--device cpu --sr-steps 1 --table pictures".split()


def run(folder, *flags):
    return commands.run("benchmark.py", *TINY, *flags, cwd=folder)


def cell_of(picture, row, column):
    """The pixels (3, SHOWN, SHOWN) of a cell of a picture."""
    step = SHOWN + 4  # cells have a white edge of 2 pixels, and stand under a line of 18
    top, left = 18 + 2 + row * step, 2 + column * step
    return picture[:, top : top + SHOWN, left : left + SHOWN]


# ---- crops and cells --------------------------------------------------------------------------


@pytest.mark.parametrize("scale, size", [(1, (70, 61)), (4, (55, 64)), (1, (30, 90))])
def test_the_crop_is_where_images_differ_most(scale, size):
    """Against a loop over all crops, in numpy."""
    images = [uniform(3, scale * size[0], scale * size[1], seed=i) for i in range(3)]
    variance = np.var(np.stack(images).astype(float), axis=0).mean(0)
    means = {}
    for top in range(max(1, size[0] - CROP + 1)):
        for left in range(max(1, size[1] - CROP + 1)):
            rows, columns = (slice(scale * n, scale * (n + CROP)) for n in (top, left))
            means[top, left] = variance[rows, columns].mean()
    assert pictures.most_different(images, scale) == max(means, key=means.__getitem__)


def test_items_are_spread_evenly():
    assert pictures.spread(range(6), 4) == [0, 1, 3, 4]
    assert pictures.spread(range(2), 4) == [0, 1] and pictures.spread([], 4) == []


def test_the_middle_of_hr_is_that_of_lr():
    lr = uniform(3, 300, 270)
    hr = lr.repeat_interleave(4, 1).repeat_interleave(4, 2)
    small, large = pictures.crop_of(lr), pictures.crop_of(hr, 4)
    assert torch.equal(small, lr[:, 22:278, 7:263]) and torch.equal(large[:, ::4, ::4], small)


def test_a_row_has_the_whole_image_with_a_frame_and_crops_of_the_same_place(tmp_path):
    lr = uniform(3, 96, 2 * SHOWN).mul(255).round() / 255
    hr = lr.repeat_interleave(4, 1).repeat_interleave(4, 2)
    other = lr.clone()
    other[:, 30 : 30 + CROP, 100 : 100 + CROP] = 1 - lr[:, 30 : 30 + CROP, 100 : 100 + CROP]
    scene = {"HR": hr, "a": lr, "b": other}
    places = pictures.save_scenes(tmp_path / "x.png", {"one": scene}, ["a", "b"])
    assert places == {"one": (30, 100)}
    picture = load_image(tmp_path / "x.png")
    assert picture.shape == (3, 18 + SHOWN + 4, 4 * (SHOWN + 4))
    assert torch.equal(cell_of(picture, 0, 1), hr[:, 120 : 120 + 4 * CROP, 400 : 400 + 4 * CROP])
    for column, image in ((2, lr), (3, other)):
        crop = image[:, 30 : 30 + CROP, 100 : 100 + CROP].numpy()
        expected = torch.from_numpy(np.kron(crop, np.ones((1, 4, 4), np.float32)))
        torch.testing.assert_close(cell_of(picture, 0, column), expected, rtol=0, atol=1e-6)
    whole = cell_of(picture, 0, 0).permute(1, 2, 0)  # half of the LR size
    red = (whole == torch.tensor([1.0, 0, 0])).all(2)
    rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
    assert (rows[0], rows[-1] + 1) == (15, 15 + CROP / 2)
    assert (columns[0], columns[-1] + 1) == (50, 50 + CROP / 2)
    assert (whole[48:] == 1).all() and not (whole[:48] == 1).all()


# ---- the command ------------------------------------------------------------------------------


def values_of(folder):
    results = json.loads((folder / "out/benchmark/results.json").read_text())
    return results["tables"]["pictures"]["values"]


def test_pairs_give_lr_of_each_method_and_enlarged_lr(tmp_path, monkeypatch):
    bicubic_for_realdgen(monkeypatch)
    make, references = generate.generate, {}

    def noted(net, hr, lr_ref, sampler, seeds):
        references.setdefault(sampler.start, set()).add(lr_ref[0].ndim)
        return make(net, hr, lr_ref, sampler, seeds)

    monkeypatch.setattr(generate, "generate", noted)
    titles, save = [], pictures.save_sheet
    sheet = lambda path, heads, rows: (titles.append(heads), save(path, heads, rows))  # noqa: E731
    monkeypatch.setattr(pictures, "save_sheet", sheet)
    monkeypatch.setattr("generate.main", lambda cfg, rt: write_pairs(Path(cfg.out)))
    names = [f"{camera}_{i}" for camera in ("Canon", "Nikon") for i in range(4)]
    write_pairs(tmp_path / "RealSR", names)
    save_image(tmp_path / "hr/a.png", uniform(3, 192, 192))
    syndiff = tmp_path / "runs/syndiff/last.pt"
    syndiff.parent.mkdir(parents=True)
    syndiff.write_bytes(b"of the stand-in")
    done = run(tmp_path, "--pairs", "RealSR", "--hr", "hr")
    assert done.returncode == 0, done.stderr
    enlarged, lr = titles
    trained = ["bicubic", "Real-ESRGAN", "RealDGen", "real pairs (oracle)"]
    assert enlarged == [
        "",
        "real LR",
        "bicubic resize",
        *(f"trained on {t}" for t in trained),
        "HR",
    ]
    assert lr == ["", "HR", "BSRGAN", "Real-ESRGAN", "SynDiff", "RealDGen", "real LR"]
    # RealDGen has F_deg; SynDiff has weights of its own, so it is given the photo.
    assert references == {"reconstruct": {1}, "light": {3}}
    values = values_of(tmp_path)
    assert len(values["pictures"]) == 4
    tested = [f"RealSR {camera}_{i}" for camera in ("Canon", "Nikon") for i in (1, 3)]
    assert [*values["enlarged"]] == tested  # the half that gives no references
    out = tmp_path / "out/benchmark"
    picture = load_image(out / "enlarged.png")
    real = load_image(tmp_path / "RealSR/LR/Canon_1.png")  # its crop is the whole image
    expected = np.kron(real.numpy(), np.ones((1, 4, 4), np.float32))
    assert torch.equal(cell_of(picture, 0, 1), torch.from_numpy(expected))
    assert torch.equal(cell_of(picture, 0, 7), load_image(tmp_path / "RealSR/HR/Canon_1.png"))
    for column, name in ((3, "bicubic"), (6, "paired")):
        (file,) = out.glob(f"sets/*/sr/fsrcnn-{name}-0-1.safetensors")
        sr_image = sr.super_resolve(sr.load_network(file), real[None])[0]
        assert (cell_of(picture, 0, column) - sr_image).abs().max() < 0.51 / 255
    text = (out / "pictures.md").read_text()
    assert "](pictures.png)" in text and "](enlarged.png)" in text and "fsrcnn" in text


@pytest.fixture
def photos(tmp_path):
    """Small HR photos, and real LR photos of one camera; there are no pairs."""
    for i, x in enumerate(scenes(2, 192)):
        save_image(tmp_path / f"hr/{i}.png", x)
        save_image(tmp_path / f"lr/{i}.png", x[:, 40:110, ::2])
    return tmp_path


def test_photos_without_pairs_are_enlarged_by_networks_trained_on_pairs_of_their_camera(photos):
    (photos / "lr/bad.png").write_bytes(b"no image")
    done = run(photos, *"--hr hr --lr lr --data bicubic realdgen paired".split())
    assert done.returncode == 0, done.stderr
    assert "skipped: lr/bad.png" in done.stdout and "sample photos degraded" not in done.stdout
    values, out = values_of(photos), photos / "out/benchmark"
    assert [*values] == ["enlarged"] and [*values["enlarged"]] == ["0", "1"]
    assert not (out / "pictures.png").exists()
    (folder,) = (out / "pictures").iterdir()
    rows = commands.rows_of(folder / "pairs")
    assert {row["lr_ref"] for row in rows} <= {"lr/0.png", "lr/1.png"} and len(rows) == 2
    made = {file.name for file in (folder / "sr").glob("*.safetensors")}
    assert made == {"fsrcnn-bicubic-0-1.safetensors", "fsrcnn-pairs-0-1.safetensors"}
    net = sr.load_network(folder / "sr/fsrcnn-pairs-0-1.safetensors")
    expected = sr.super_resolve(net, load_image(photos / "lr/0.png")[None])[0]
    top, left = (4 * n for n in values["enlarged"]["0"])
    found = cell_of(load_image(out / "enlarged.png"), 0, 4)
    crop = expected[:, top : top + 4 * CROP, left : left + 4 * CROP]
    assert (found - crop).abs().max() < 0.51 / 255
    save_image(photos / "lr/0.png", uniform(3, 70, 70))  # other references: other networks
    assert run(photos, *"--hr hr --lr lr --data realdgen".split()).returncode == 0
    assert len([*(out / "pictures").iterdir()]) == 2


def test_what_can_not_be_shown_is_one_sentence(photos):
    (photos / "bad").mkdir()
    (photos / "bad/x.png").write_bytes(b"no image")
    for flags, word in (
        ("--lr lr --data syndiff", "--data syndiff: choose among bicubic, realesrgan, realdgen."),
        ("--lr nowhere", "--lr nowhere"),
        ("--lr bad", "--lr: none of its photos can be read"),
    ):
        commands.assert_refused(run(photos, "--hr", "hr", *flags.split()), word)
    save_image(photos / "out/benchmark/enlarged.png", uniform(3, 9, 9))
    before = (photos / "out/benchmark/enlarged.png").read_bytes()
    commands.assert_refused(run(photos, "--hr", "hr", "--lr", "lr"), "enlarged.png is there")
    assert (photos / "out/benchmark/enlarged.png").read_bytes() == before

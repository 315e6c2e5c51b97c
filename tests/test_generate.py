"""generate.py: the filter, the start image, sizes, and the command line on all kinds of images."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import common
import degrade
import diffusion
import extractors
import generate
from data import shards as tars

REPO = Path(__file__).resolve().parents[1]
STAGE_1 = extractors.Config(
    as_printed=False,
    compile=False,
    vq_channels=8,
    vq_multipliers=(1, 2, 2),
    vq_blocks=1,
    vq_codes=16,
    deg_channels=8,
    deg_blocks=1,
    deg_dim=16,
    mod_channels=8,
)
STAGE_2 = diffusion.Config(
    as_printed=False,
    compile=False,
    widths=(8, 16),
    blocks=1,
    attention=(1,),
    mod_channels=8,
    cond_channels=4,
)
CONFIG = asdict(STAGE_2) | {"extractors": asdict(STAGE_1)}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=common.generator(seed, *shape))


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth uint8 pixels (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / (4 + c + seed) + x / (7 + 2 * c)) for c in range(3)]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="module")
def net():
    """A tiny untrained model; its zero-initialised weights are moved."""
    torch.manual_seed(0)
    net = diffusion.DecoupledDDPM(extractors.Extractors(STAGE_1), STAGE_1, STAGE_2)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    """The model as common.Run leaves it."""
    path = tmp_path_factory.mktemp("weights") / "last.pt"
    weights = net.state_dict()
    state = {"step": 1, "steps": 1, "net": weights, "ema": weights, "opt": {}, "config": CONFIG}
    torch.save(state, path)
    return path


# ---- the method -------------------------------------------------------------------------------


def test_any_size_gives_a_quarter_of_it(net):
    hr = common.crop_to_multiple(uniform(3, 37, 50), generate.SCALE, "x")[None]
    assert hr.shape == (1, 3, 36, 48)
    lr, scores = generate.generate(net, hr, [uniform(3, 17, 20)], 10, 2, 3)
    assert lr.shape == (1, 3, 3, 9, 12)
    assert 0 <= lr.min() and lr.max() <= 1 and lr.isfinite().all()
    assert scores["content"].shape == scores["degradation"].shape == (1, 3)
    assert 0 <= scores["kept"][0] < 3


def test_no_noise_steps_give_rec_lr_s_answer(net):
    hr, refs = uniform(2, 3, 40, 48), [uniform(3, 16, 20), uniform(3, 30, 18, seed=1)]
    lr, scores = generate.generate(net, hr, refs, 0, 10, 4, seeds=(0, 1), bf16=False, grain=False)
    codes = torch.cat([net.extractors.e_deg(ref[None]) for ref in refs])
    expected = net.extractors.reconstruct(codes, hr, net.extractors.content(hr)).clamp(0, 1)
    assert lr.shape == (2, 1, 3, 10, 12) and scores["kept"].tolist() == [0, 0]
    torch.testing.assert_close(lr[:, 0], expected)


def test_reference_image_and_seed_matter(net):
    hr, ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    settings = {"t_start": 20, "num_steps": 2, "candidates": 2}
    lr = generate.generate(net, hr, [ref], **settings, seeds=(5,))[0]
    assert torch.equal(lr, generate.generate(net, hr, [ref], **settings, seeds=(5,))[0])
    assert not torch.equal(lr[:, 0], lr[:, 1])  # candidates differ
    for other in (
        generate.generate(net, hr, [1 - ref / 2], **settings, seeds=(5,)),
        generate.generate(net, 1 - hr, [ref], **settings, seeds=(5,)),
        generate.generate(net, hr, [ref], **settings, seeds=(6,)),
        generate.generate(net, hr, [ref], **settings, seeds=(5,), start="degrade"),
    ):
        assert (lr - other[0]).abs().max() > 1e-3


def test_degraded_start_is_d_of_the_hr_image():
    hr, answer = uniform(1, 3, 64, 64), uniform(1, 3, 16, 16)
    assert generate.start_image(hr, answer, "reconstruct", 3, "light") is answer
    start = generate.start_image(hr, answer, "degrade", 3, "light")
    theta = degrade.sample_degradation(1, "light", generator=common.generator(3))
    assert torch.equal(start, degrade.degrade(hr, theta))


def test_the_codes_of_a_folder_are_averaged_from_the_reference_on(net, tmp_path):
    for i, name in enumerate(("a/1.png", "a/2.png", "a/3.png", "b/1.png")):
        common.save_image(tmp_path / name, uniform(3, 32, 32, seed=i))
    (tmp_path / "a" / "4.png").write_text("not an image")
    references = generate.References(generate.Config(lr_ref=(str(tmp_path),), bf16=False), net)
    names = [file.relative_to(tmp_path).as_posix() for file in references.files]
    code = {name: references.code(i) for i, name in enumerate(names)}
    mean = {n: references.mean_code(names.index("a/2.png"), n) for n in (1, 2, 3, 99)}
    assert torch.equal(mean[1], code["a/2.png"])
    assert torch.allclose(mean[2], (code["a/2.png"] + code["a/3.png"]) / 2)
    assert torch.allclose(mean[3], mean[2])  # the third can't be read
    assert torch.allclose(mean[99], (code["a/1.png"] + code["a/2.png"] + code["a/3.png"]) / 3)
    assert torch.equal(references.mean_code(names.index("b/1.png"), 99), code["b/1.png"])
    assert references.mean_code(names.index("a/4.png"), 99) is None


def test_an_image_does_not_depend_on_the_others_of_a_call(net):
    hr, refs = uniform(3, 3, 40, 48), [uniform(3, 16, 20, seed=i) for i in range(3)]
    lr, scores = generate.generate(net, hr, refs, 20, 3, 2, seeds=(4, 5, 6))
    for b in range(3):
        alone, own = generate.generate(
            net, hr[b : b + 1], refs[b : b + 1], 20, 3, 2, seeds=(4 + b,)
        )
        assert torch.equal(alone[0], lr[b])
        assert all(torch.equal(own[key][0], scores[key][b]) for key in scores)


def test_a_reference_may_be_given_by_its_code(net):
    hr, ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    code = net.extractors.e_deg(ref[None])[0]
    lr = generate.generate(net, hr, [ref], 20, 2, 2, bf16=False)[0]
    assert torch.equal(generate.generate(net, hr, [code], 20, 2, 2, bf16=False)[0], lr)


def test_candidates_take_turns_at_several_t(net):
    hr, ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    several = generate.generate(net, hr, [ref], (5, 40), 2, 3, seeds=(7,))[0][0]
    for k, t in enumerate((5, 40, 5)):
        alone = generate.generate(net, hr, [ref], t, 2, 3, seeds=(7,))[0][0, k]
        torch.testing.assert_close(several[k], alone, atol=1e-5, rtol=0)


def reads(net, lr_ref: Tensor, of_reference: tuple, of_others: tuple):
    """A head that reads noise (levels) and JPEG quality like this in a reference, and in others."""
    code = generate.code_of(net, lr_ref)

    def named(found: Tensor) -> tuple[Tensor, Tensor]:
        noise, quality = of_reference if torch.equal(found, code) else of_others
        return torch.full((len(found),), noise / 255), torch.full((len(found),), quality)

    return named


def test_grain_is_the_noise_that_an_image_lacks(net, monkeypatch):
    hr, lr_ref = uniform(1, 3, 256, 256) / 2 + 0.25, [uniform(3, 40, 40)]
    plain = generate.generate(net, hr, lr_ref, 0, 1, 1, grain=False, bf16=False)[0]
    for wanted, there, added in ((10, 0, 10), (5, 3, 4), (5, 6, 0), (3, 0, 0)):
        head = reads(net, lr_ref[0], (wanted, 100), (there, 100))
        monkeypatch.setattr(net.extractors, "named", head)
        noisy, again = (
            generate.generate(net, hr, lr_ref, 0, 1, 1, bf16=False)[0] for _ in range(2)
        )
        inside = (plain > 0.2) & (plain < 0.8)  # where nothing is clipped
        std = (255 * (noisy - plain)[inside]).std().item()
        assert std == pytest.approx(added, rel=0.05, abs=1e-3)
        assert torch.equal(noisy, again)
        other = generate.generate(net, hr, lr_ref, 0, 1, 1, seeds=[1], bf16=False)[0]
        assert torch.equal(noisy, other) == (added == 0)


def test_weights_as_printed_generate_and_read_no_grain(tmp_path):
    stage_1, stage_2 = (replace(cfg, as_printed=True) for cfg in (STAGE_1, STAGE_2))
    printed = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    config = asdict(stage_2) | {"extractors": asdict(stage_1)}
    torch.save({"ema": printed.state_dict(), "config": config}, tmp_path / "last.pt")
    net = generate.load_generator(str(tmp_path / "last.pt"), torch.device("cpu"))
    hr, lr_ref = uniform(1, 3, 32, 32), [uniform(3, 16, 16)]
    lr = generate.generate(net, hr, lr_ref, 10, 2, 2, grain=False)[0]
    assert lr.shape == (1, 2, 3, 8, 8) and lr.isfinite().all()
    with pytest.raises(common.UserError, match="--no-grain"):
        generate.load_generator(str(tmp_path / "last.pt"), torch.device("cpu"), grain=True)


def test_weights_of_another_version_are_one_sentence(net, tmp_path):
    ema = net.state_dict()
    ema.pop("extractors.head.1.weight")
    torch.save({"ema": ema, "config": CONFIG}, tmp_path / "last.pt")
    with pytest.raises(common.UserError, match=r"last\.pt: weights of another configuration"):
        generate.load_generator(str(tmp_path / "last.pt"), torch.device("cpu"))


def test_grain_ends_with_the_compression_that_the_head_reads(net, monkeypatch):
    hr, lr_ref = uniform(1, 3, 128, 128), [uniform(3, 40, 40)]
    for t_start in (0, 20):
        plain = generate.generate(net, hr, lr_ref, t_start, 2, 2, grain=False, bf16=False)[0]
        for quality, changed in ((40, True), (100, False)):
            head = reads(net, lr_ref[0], (0, quality), (0, 100))
            monkeypatch.setattr(net.extractors, "named", head)
            made = generate.generate(net, hr, lr_ref, t_start, 2, 2, bf16=False)[0]
            assert torch.equal(made, plain) != changed
            jpeg = degrade.jpeg(plain[0], torch.full((len(plain[0]),), quality))
            assert torch.equal(made[0], jpeg) == changed


def test_noise_that_compression_looks_like_is_not_added(net, monkeypatch):
    """What is lacking is judged against the candidate once compressed, not before."""
    hr, lr_ref = uniform(1, 3, 128, 128), [uniform(3, 40, 40)]
    plain = generate.generate(net, hr, lr_ref, 0, 1, 1, grain=False, bf16=False)[0][0]
    jpeg = degrade.jpeg(plain, torch.tensor([50]))
    codes = {"reference": generate.code_of(net, lr_ref[0]), "jpeg": net.extractors.e_deg(jpeg)}

    def named(found: Tensor) -> tuple[Tensor, Tensor]:
        known = any(torch.allclose(found, code, atol=1e-6) for code in codes.values())
        return torch.full((len(found),), 8 / 255 * known), torch.full((len(found),), 50)

    monkeypatch.setattr(net.extractors, "named", named)
    made = generate.generate(net, hr, lr_ref, 0, 1, 1, bf16=False)[0][0]
    assert torch.equal(made, jpeg)


# ---- tiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (64, 33), (50, 71)])
def test_tiles_of_a_local_function_are_the_whole(monkeypatch, size):
    """A convolution looks one pixel around, and the outermost pixels of a tile count least."""
    monkeypatch.setattr(extractors, "TILE", 24)
    monkeypatch.setattr(extractors, "OVERLAP", 8)
    calls = []

    def function(hr: Tensor, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch.nn.functional.avg_pool2d(hr, 4) + 2 * x

    h, w = size
    hr, x = uniform(2, 3, 4 * h, 4 * w), uniform(2, 3, h, w, seed=1)
    made = extractors.in_tiles(function, size, hr, x)
    torch.testing.assert_close(made, function(hr, x), atol=1e-5, rtol=0)
    assert all(max(shape[2:]) <= 24 for shape in calls[:-1])


@pytest.mark.parametrize("n", [25, 41, 43, 45])
def test_a_tile_that_ends_just_before_the_image_leaves_no_seam(monkeypatch, n):
    """Its last pixels have next to no weight beside those of the tile that ends with the image."""
    monkeypatch.setattr(extractors, "TILE", 24)
    monkeypatch.setattr(extractors, "OVERLAP", 8)

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1)  # darkens its edges

    x = torch.ones(1, 3, n, 20)
    made = extractors.in_tiles(function, (n, 20), x)
    torch.testing.assert_close(made, function(x), atol=2e-3, rtol=0)


def test_a_tiled_image_has_no_seams(net, monkeypatch):
    hr, ref = uniform(1, 3, 4 * 56, 4 * 40), uniform(3, 16, 16)
    hr = extractors.resized(hr[..., ::8, ::8], 4 * 56, 4 * 40).clamp(0, 1)
    whole = generate.generate(net, hr, [ref], 20, 3, 1)[0][0, 0]
    monkeypatch.setattr(extractors, "TILE", 24)
    monkeypatch.setattr(extractors, "OVERLAP", 8)
    tiled = generate.generate(net, hr, [ref], 20, 3, 1)[0][0, 0]
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    steps = (tiled - whole).diff(dim=2).abs().mean((0, 1))  # (w - 1,)
    border = torch.zeros_like(steps, dtype=torch.bool)
    border[[15, 16, 23, 24]] = True  # where a tile begins or ends
    assert steps[border].mean() < 2 * steps[~border].mean()


def test_errors_are_zero_only_for_the_same_content_and_degradation(net):
    lr = uniform(1, 3, 9, 12)
    code, content = net.extractors.e_deg(lr), net.extractors.content(extractors.resized(lr, 36, 48))
    far, near = generate.errors(net, lr, code, content)
    assert far.shape == near.shape == (1,)
    assert far.max() < 1e-5 and near.max() < 1e-5
    torch.testing.assert_close(generate.errors(net, lr, code, content - 1)[0], far + 1)
    torch.testing.assert_close(generate.errors(net, lr, code - 1, content)[1], near + 4.0)


@pytest.mark.parametrize("good", [0, 1, 2, 3])
def test_filter_keeps_the_good_candidate(net, monkeypatch, good):
    """Candidates of noise and one that has the content of hr: the reduction of hr itself."""
    hr, planted = uniform(1, 3, 9, 12), uniform(4, 3, 9, 12, seed=1)
    planted[good] = hr[0]
    monkeypatch.setattr(generate.diffusion, "sample", lambda *_: planted)
    hr = extractors.resized(hr, 36, 48).clamp(0, 1)
    reference = planted[good]  # of the right degradation, too
    lr, scores = generate.generate(net, hr, [reference], 10, 2, 4, grain=False)
    assert scores["kept"].tolist() == [good]
    assert torch.equal(lr[0], planted[..., :9, :12])


def test_filter_weighs_both_errors_equally(net, monkeypatch):
    tables = {
        # Relative to their means: content (0.5, 0.8, 1.7), degradation (1.7, 0.8, 0.5).
        "both": (torch.tensor([0.5, 0.8, 1.7]), torch.tensor([170.0, 80.0, 50.0])),
        "zero": (torch.zeros(3), torch.tensor([3.0, 1.0, 2.0])),
    }
    for table in tables.values():
        monkeypatch.setattr(generate, "errors", lambda *_, table=table: table)
        scores = generate.generate(net, uniform(1, 3, 32, 32), [uniform(3, 16, 16)], 5, 1, 3)[1]
        assert scores["kept"].tolist() == [1]


def test_unique_names():
    files = [Path(p) for p in ("a/x.png", "b/x.png", "b/y.jpg", "c/x.jpg")]
    assert generate.unique_names(files) == ["x", "x_2", "y", "x_3"]


def test_unique_names_do_not_meet_a_file_that_is_called_so():
    names = generate.unique_names([Path(p) for p in ("a/x.png", "b/x.png", "b/x_2.png")])
    assert len(set(names)) == 3


def drawn_references(tmp_path, net, count: int = 4) -> generate.References:
    for i in range(count):
        (tmp_path / "refs").mkdir(exist_ok=True)
        Image.fromarray(pixels(20, 20, i)).save(tmp_path / "refs" / f"{i}.png")
    return generate.References(generate.Config(lr_ref=(str(tmp_path / "refs"),)), net)


def test_references_are_drawn_from_all_and_depend_on_the_numbers(tmp_path, net):
    references = drawn_references(tmp_path, net)
    drawn = [[references.draw(seed, i) for i in range(40)] for seed in (0, 0, 1)]
    assert set(drawn[0]) == {0, 1, 2, 3}
    assert drawn[0] == drawn[1] != drawn[2]


def test_codes_of_references_are_saved_and_read(tmp_path, net):
    references = drawn_references(tmp_path, net)
    (tmp_path / "refs" / "1.png").write_text("not an image")
    references.save(tmp_path / "codes.safetensors")
    shutil.rmtree(tmp_path / "refs")
    read = generate.References(generate.Config(codes=str(tmp_path / "codes.safetensors")), net)
    assert [file.name for file in read.files] == ["0.png", "2.png", "3.png"]
    for r, number in enumerate((0, 2, 3)):
        assert torch.equal(read.code(r), references.code(number))


def test_of_a_large_reference_whole_blocks_of_jpeg_are_read(net):
    """Its code is that of a crop which begins at a multiple of 8, whatever its size."""
    for height, width, top, left in ((1080, 776, 280, 128), (520, 513, 0, 0), (3000, 90, 1240, 0)):
        lr_ref = uniform(3, height, width)
        crop = lr_ref[:, top : top + 512, left : left + 512]
        assert torch.equal(generate.code_of(net, lr_ref), generate.code_of(net, crop))


def test_pairings_plan_every_pair():
    files = [Path(f"{name}.png") for name in "abc"]
    refs = [Path("x/r0.jpg"), Path("x/r1.jpg")]
    random = generate.plan(files, refs, "random")
    assert [(job.name, job.reference) for job in random] == [(name, None) for name in "abc"]
    turns = generate.plan(files, refs, "round-robin")
    assert [(job.name, job.reference) for job in turns] == [("a", 0), ("b", 1), ("c", 0)]
    every = generate.plan(files, refs, "all")
    assert [(job.name, job.reference) for job in every[:3]] == [
        ("a_r0000", 0),
        ("a_r0001", 1),
        ("b_r0000", 0),
    ]
    assert len({job.index for job in every}) == len(every) == 6


def test_a_file_says_the_pairs(tmp_path):
    files, refs = [Path("hr/a.png"), Path("hr/b.png")], [Path("x/r.jpg"), Path("y/r.jpg")]
    table = tmp_path / "pairs.txt"
    table.write_text("b.png\tx/r.jpg\nhr/a.png\ty/r.jpg\n")
    assert [job.reference for job in generate.plan(files, refs, str(table))] == [1, 0]
    for text, word in (
        ("a.png\tr.jpg\n", "2 photos are called r.jpg"),
        ("c.png\tx/r.jpg\n", "0 photos are called c.png"),
        ("a.png x/r.jpg\n", "tab"),
        ("a.png\tx/r.jpg\n", "nothing of hr/b.png"),
    ):
        table.write_text(text)
        with pytest.raises(common.UserError, match=word):
            generate.plan(files, refs, str(table))


# ---- the command line -------------------------------------------------------------------------


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "generate.py", *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(a) for a in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence that names what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A folder with inputs and the pairs of a first run, and that run."""
    folder = tmp_path_factory.mktemp("finished")
    for name, height, width in (("a", 37, 50), ("b", 64, 48), ("c", 64, 48), ("d", 64, 48)):
        (folder / "hr").mkdir(exist_ok=True)
        Image.fromarray(pixels(height, width)).save(folder / "hr" / f"{name}.png")
    (folder / "refs").mkdir()
    for i in range(2):
        Image.fromarray(pixels(20, 24, 5 * i)).save(folder / "refs" / f"r{i}.jpg")
    return folder, run(*flags(checkpoint), cwd=folder)


def flags(checkpoint: Path, *more: object) -> list[object]:
    """Flags for a run inside the folder: a copy of it gets the same records."""
    paths = ["--hr", "hr", "--lr-ref", "refs", "--checkpoint", checkpoint, "--out", "out"]
    return [*paths, "--t-start", 20, "--num-steps", 2, "--candidates", 4, *more]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished folder that a test may change."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_folder_becomes_aligned_pairs(finished):
    folder, done = finished
    out = folder / "out"
    assert done.returncode == 0, done.stderr
    assert "4 pairs" in done.stdout and "0 images skipped" in done.stdout
    names = ["a.png", "b.png", "c.png", "d.png"]
    assert sorted(p.name for p in (out / "hr").iterdir()) == names
    assert sorted(p.name for p in (out / "lr").iterdir()) == names
    assert set(files_of(out)) - {f"{side}/{n}" for side in ("hr", "lr") for n in names} == {
        "pairs.jsonl",
        "meta_info.txt",
        "preview.png",
        "report.html",
    }
    lines = (out / "meta_info.txt").read_text().splitlines()
    assert lines == [f"hr/{name}, lr/{name}" for name in names]
    for name in names:
        hr, lr, source = (
            np.asarray(Image.open(p))
            for p in (out / "hr" / name, out / "lr" / name, folder / "hr" / name)
        )
        H, W = (side // 4 * 4 for side in source.shape[:2])
        np.testing.assert_array_equal(hr, source[:H, :W])
        assert lr.shape == (H // 4, W // 4, 3)
    Image.open(out / "preview.png").load()


def test_every_pair_is_recorded(finished):
    folder = finished[0]
    records = [json.loads(line) for line in (folder / "out" / "pairs.jsonl").open()]
    assert [r["lr"] for r in records] == [f"lr/{name}.png" for name in "abcd"]
    for record in records:
        assert all((folder / record[key]).is_file() for key in ("source", "lr_ref"))
        assert len(record["content_errors"]) == len(record["degradation_errors"]) == 4
        assert 0 <= record["kept"] < 4
        assert (record["seed"], record["t_start"], record["num_steps"]) == (0, 20, 2)
        assert (record["t"], record["domain"], record["dropped"]) == (20, "refs", False)


def test_a_second_run_changes_no_byte(copied, checkpoint):
    before = files_of(copied / "out")
    times = {p: p.stat().st_mtime_ns for p in (copied / "out").rglob("*")}
    done = run(*flags(checkpoint), cwd=copied)
    assert done.returncode == 0 and files_of(copied / "out") == before
    assert {p: p.stat().st_mtime_ns for p in (copied / "out").rglob("*")} == times


@pytest.mark.parametrize("name", ["c"])
def test_a_deleted_file_comes_back_identical(finished, checkpoint, name):
    folder = finished[0]
    before = files_of(folder / "out")
    (folder / "out" / "lr" / f"{name}.png").unlink()
    done = run(*flags(checkpoint), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert files_of(folder / "out") == before


def test_a_run_that_was_killed_goes_on(copied, checkpoint):
    """The last line of the table is torn, and one picture is missing."""
    table = copied / "out" / "pairs.jsonl"
    before = {name: data for name, data in files_of(copied / "out").items() if "r/" in name}
    text = table.read_text()
    table.write_text(text[: len(text) - 40])
    (copied / "out" / "lr" / "b.png").unlink()
    done = run(*flags(checkpoint), cwd=copied)
    assert done.returncode == 0, done.stderr
    after = files_of(copied / "out")
    assert {name: data for name, data in after.items() if "r/" in name} == before
    assert len([json.loads(line) for line in table.open()]) == 4


def test_a_torn_line_does_not_swallow_the_next_one(copied, checkpoint):
    """As when a process was killed while it wrote to its own table, before all were joined."""
    out = copied / "out"
    text = (out / "pairs.jsonl").read_text()
    (out / "pairs.jsonl").unlink()
    (out / "pairs.0.jsonl").write_text(text[: len(text) - 40])  # of d's line
    done = run(*flags(checkpoint), cwd=copied)
    assert done.returncode == 0 and "4 pairs" in done.stdout and "0 images skipped" in done.stdout
    assert (out / "pairs.jsonl").read_text() == text


def test_other_weights_or_references_need_another_folder(copied, checkpoint):
    before = files_of(copied / "out")
    state = common.load_checkpoint(checkpoint)
    state["ema"] = {key: value + 0.01 for key, value in state["ema"].items()}
    torch.save(state, copied / "other.pt")
    assert_refused(run(*flags(copied / "other.pt"), cwd=copied), "weights", "--out")
    shutil.copytree(copied / "refs", copied / "other")
    assert_refused(run(*flags(checkpoint, "--lr-ref", "other"), cwd=copied), "refs/r", "--out")
    assert files_of(copied / "out") == before


def test_other_settings_need_another_folder(copied, checkpoint):
    before = files_of(copied / "out")
    assert_refused(run(*flags(checkpoint, "--seed", 1), cwd=copied), "seed", "--out")
    assert files_of(copied / "out") == before


def test_unreadable_images_are_skipped_and_counted(copied, checkpoint):
    shutil.rmtree(copied / "out")
    (copied / "hr" / "b.png").write_text("This is not an image.")
    image = Image.fromarray(pixels(64, 64))
    image.save(copied / "hr" / "e.jpg")
    data = (copied / "hr" / "e.jpg").read_bytes()
    (copied / "hr" / "e.jpg").write_bytes(data[: len(data) // 2])
    Image.fromarray(pixels(20, 64)).save(copied / "hr" / "f.png")
    (copied / "hr" / "notes.txt").write_text("Not an image by name: no mention.")
    (copied / "refs" / "r1.jpg").write_bytes(b"")
    Image.fromarray(pixels(8, 8)).save(copied / "refs" / "r2.png")
    done = run(*flags(checkpoint), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert "3 pairs" in done.stdout and "3 images skipped" in done.stdout
    assert sorted(p.name for p in (copied / "out" / "lr").iterdir()) == ["a.png", "c.png", "d.png"]
    for name in ("b.png", "e.jpg", "f.png"):
        assert name in done.stdout + done.stderr
    assert "notes.txt" not in done.stdout + done.stderr
    records = [json.loads(line) for line in (copied / "out" / "pairs.jsonl").open()]
    assert {Path(r["lr_ref"]).name for r in records} == {"r0.jpg"}


def test_all_kinds_of_images_are_handled(copied, checkpoint):
    shutil.rmtree(copied / "out")
    shutil.rmtree(copied / "hr")
    (copied / "hr").mkdir()
    color = pixels(64, 48)
    image = Image.fromarray(color)
    image.convert("L").save(copied / "hr" / "gray.png")
    image.convert("P").save(copied / "hr" / "palette.png")
    rgba = np.concatenate([color, color[..., :1]], axis=2)
    Image.fromarray(rgba).save(copied / "hr" / "alpha.png")
    Image.fromarray(color[..., 0].astype(np.uint16) * 257).save(copied / "hr" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: 48 x 64 becomes 64 x 48
    Image.fromarray(pixels(48, 64)).save(copied / "hr" / "lying.jpg", exif=exif, quality=95)
    done = run(*flags(checkpoint, "--candidates", 1), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert "5 pairs" in done.stdout and "0 images skipped" in done.stdout
    for name in ("gray", "palette", "alpha", "deep", "lying"):
        hr, lr = (Image.open(copied / "out" / side / f"{name}.png") for side in ("hr", "lr"))
        assert (hr.mode, hr.size, lr.mode, lr.size) == ("RGB", (48, 64), "RGB", (12, 16)), name
    written = {p.stem: np.asarray(Image.open(p)) for p in (copied / "out" / "hr").iterdir()}
    gray, deep, upright = (written[name] for name in ("gray", "deep", "lying"))
    assert (gray == gray[..., :1]).all()
    np.testing.assert_array_equal(deep, np.repeat(color[..., :1], 3, axis=2))
    assert np.abs(upright.astype(float) - np.rot90(pixels(48, 64), -1)).mean() < 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--start", "foo"], ["--start", "foo"]),
        (["--t-start", "-1"], ["--t-start", "-1"]),
        (["--candidates", "0"], ["--candidates", "0"]),
        (["--auto-t", "--candidates", "1"], ["--auto-t", "--candidates 4"]),
        (["--pairing", "foo"], ["--pairing", "foo"]),
        (["--max-error", "1"], ["--max-error"]),
        (["--solver", "foo"], ["--solver", "foo"]),
        (["--solver", "dpm", "--eta", "1"], ["--eta", "dpm"]),
        (["--codes", "torn.pt"], ["--codes", "torn.pt"]),
        (["--hr", "missing"], ["--hr", "missing"]),
        (["--hr", "empty"], ["--hr", "empty"]),
        (["--lr-ref", "empty"], ["--lr-ref", "empty"]),
        (["--checkpoint", "missing.pt"], ["--checkpoint", "missing.pt"]),
        (["--checkpoint", "torn.pt"], ["torn.pt"]),
        (["--checkpoint", "stage_1.pt"], ["stage_1.pt", "diffusion.py"]),
    ],
)
def test_senseless_input_is_refused_and_nothing_written(copied, checkpoint, capsys, more, words):
    shutil.rmtree(copied / "out")
    (copied / "empty").mkdir()
    (copied / "torn.pt").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"ema": {}, "config": asdict(STAGE_1)}, copied / "stage_1.pt")
    before = files_of(copied)
    # In this process: a new one takes seconds to import torch.
    done = refused_here([str(a) for a in flags(checkpoint, *more)], copied, capsys)
    assert_refused(done, *words)
    assert files_of(copied) == before and not (copied / "out").exists()


def refused_here(argv: list[str], cwd: Path, capsys) -> subprocess.CompletedProcess:
    """What `generate.py argv` would print and return, without a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["generate.py", *argv])
        with pytest.raises(SystemExit) as stopped:
            common.launch(generate.main, generate.Config, generate.PRESETS, "")
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(argv, stopped.value.code, out, err)


def test_missing_weights_name_the_command_that_makes_them(copied, checkpoint, monkeypatch, capsys):
    shutil.rmtree(copied / "out")
    monkeypatch.setattr(common, "__file__", str(copied / "common.py"))  # no data/pretrained there
    argv = [str(a) for a in flags(Path()) if a not in ("--checkpoint", Path())]
    before = files_of(copied)
    assert_refused(refused_here(argv, copied, capsys), "python diffusion.py")
    assert files_of(copied) == before and not (copied / "out").exists()


def test_another_photo_of_the_same_name_is_not_taken_for_the_finished_one(copied, checkpoint):
    shutil.copytree(copied / "hr", copied / "other")
    Image.fromarray(pixels(64, 48, 9)).save(copied / "other" / "b.png")
    done = run(*flags(checkpoint), "--hr", "other", cwd=copied)
    hr = np.asarray(Image.open(copied / "out" / "hr" / "b.png"))
    assert done.returncode == 2 or (hr == pixels(64, 48, 9)).all()


def test_a_run_on_fewer_photos_forgets_no_pair(copied, checkpoint):
    done = run(*flags(checkpoint), "--hr", "hr/b.png", cwd=copied)
    table = (copied / "out" / "pairs.jsonl").read_text()
    assert done.returncode == 2 or all(f"lr/{name}.png" in table for name in "abcd")


def test_no_usable_image_at_all_is_an_error(copied, checkpoint):
    shutil.rmtree(copied / "out")
    for file in (copied / "hr").iterdir():
        file.write_text("This is not an image.")
    assert_refused(run(*flags(checkpoint), cwd=copied), "none of the HR images")
    assert not list((copied / "out").rglob("*.png"))


def test_no_usable_reference_at_all_is_an_error(copied, checkpoint):
    shutil.rmtree(copied / "out")
    for file in (copied / "refs").iterdir():
        file.write_text("This is not an image.")
    assert_refused(run(*flags(checkpoint), cwd=copied), "--lr-ref")


def test_two_processes_make_the_same_bytes_as_one(copied, checkpoint):
    before = files_of(copied / "out")
    shutil.rmtree(copied / "out")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, REPO / "generate.py", *flags(checkpoint)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(a) for a in command], cwd=copied, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert files_of(copied / "out") == before


def test_poor_pairs_are_dropped_counted_and_not_made_again(copied, checkpoint, capsys):
    records = [json.loads(line) for line in (copied / "out" / "pairs.jsonl").open()]
    errors = sorted(record["content_errors"][record["kept"]] for record in records)
    shutil.rmtree(copied / "out")
    more = ("--max-error", (errors[1] + errors[2]) / 2, 1e9)
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert "2 pairs" in done.stdout and "2 dropped" in done.stdout
    before = files_of(copied / "out")
    lines = [json.loads(line) for line in before["pairs.jsonl"].decode().splitlines()]
    assert len(lines) == 4 and sum(line["dropped"] for line in lines) == 2
    assert before["meta_info.txt"].count(b"\n") == 2
    assert len(list((copied / "out" / "lr").iterdir())) == 2
    assert run(*flags(checkpoint, *more), cwd=copied).returncode == 0
    assert files_of(copied / "out") == before


def test_all_pairs_of_photos_and_stored_codes_with_jitter(copied, checkpoint):
    shutil.rmtree(copied / "out")
    more = ("--pairing", "all", "--candidates", 1, "--codes", "codes.safetensors")
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0 and "8 pairs" in done.stdout, done.stderr
    before = files_of(copied / "out")
    shutil.rmtree(copied / "out")
    shutil.rmtree(copied / "refs")  # the codes are enough
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0, done.stderr
    after = files_of(copied / "out")
    assert {k for k in before if before[k] != after.get(k)} <= {"preview.png", "report.html"}
    shutil.rmtree(copied / "out")
    done = run(*flags(checkpoint, *more, "--jitter", 1), cwd=copied)
    assert done.returncode == 0, done.stderr
    mixed = files_of(copied / "out")
    assert sum(mixed[k] != before[k] for k in before if k.startswith("lr/")) >= 3


def test_a_run_that_stores_codes_draws_as_the_runs_that_read_them(copied, checkpoint):
    """Also where a reference can't be read, which the file of codes leaves out."""
    (copied / "refs" / "a.jpg").write_text("not an image")  # before the others
    more = ("--codes", "codes.safetensors", "--candidates", 1)
    drawn = []
    for out in ("first", "second"):
        done = run(*flags(checkpoint, *more), "--out", out, cwd=copied)
        assert done.returncode == 0, done.stderr
        drawn.append(files_of(copied / out))
        del drawn[-1]["report.html"]  # names its folder
    assert drawn[0] == drawn[1]


def test_syndiff_draws_its_strength_for_each_image(copied, checkpoint):
    shutil.rmtree(copied / "out")
    more = ("--preset", "syndiff", "--t-start", 40, "--t-min", 10, "--candidates", 1)
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (copied / "out" / "pairs.jsonl").open()]
    ts = [record["t"] for record in records]
    assert all(10 <= t <= 40 for t in ts) and len(set(ts)) > 1
    assert all(record["recipe"] == "light" and len(record["content_errors"]) == 1
               for record in records)  # fmt: skip


def test_only_the_best_pairs_are_kept(copied, checkpoint, capsys):
    shutil.rmtree(copied / "out")
    first = run(*flags(checkpoint, "--keep", 2), cwd=copied)
    assert first.returncode == 0, first.stderr
    assert "2 pairs" in first.stdout and "2 dropped" in first.stdout
    records = [json.loads(line) for line in open(copied / "out/pairs.jsonl")]
    kept = {record["lr"] for record in records if not record["dropped"]}
    assert {f"lr/{p.name}" for p in (copied / "out/lr").iterdir()} == kept and len(kept) == 2
    errors = np.array(
        [[r[f"{n}_errors"][r["kept"]] for n in ("content", "degradation")] for r in records]
    )
    total = (errors / errors.mean(0)).sum(1)
    best = {records[i]["lr"] for i in np.argsort(total, kind="stable")[:2]}
    assert kept == best
    before = files_of(copied / "out")
    assert run(*flags(checkpoint, "--keep", 2), cwd=copied).returncode == 0
    assert files_of(copied / "out") == before


def test_tar_shards_hold_the_same_pairs(copied, checkpoint):
    wds = pytest.importorskip("webdataset")
    folder = files_of(copied / "out")
    shutil.rmtree(copied / "out")
    more = ("--format", "webdataset", "--per-shard", 3)
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert "4 pairs" in done.stdout
    shards = sorted(str(p) for p in (copied / "out").glob("*.tar"))
    assert [Path(p).name for p in shards] == ["0000-000000.tar", "0000-000001.tar"]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    assert sorted(s["__key__"] for s in samples) == list("abcd")
    for s in samples:
        assert s["hr.png"] == folder[f"hr/{s['__key__']}.png"]
        assert s["lr.png"] == folder[f"lr/{s['__key__']}.png"]
        assert json.loads(s["json"])["hr"] == f"hr/{s['__key__']}.png"
    assert not list((copied / "out").glob("?r/*.png"))
    before = files_of(copied / "out")
    assert "preview.png" in before and "meta_info.txt" not in before  # which would name no files
    # Killed between a shard and the deletion of what is in it: one pair whole, one half deleted.
    for name in ("hr/a.png", "lr/a.png", "lr/b.png"):
        (copied / "out" / name).parent.mkdir(exist_ok=True)
        (copied / "out" / name).write_bytes(folder[name])
    assert run(*flags(checkpoint, *more), cwd=copied).returncode == 0
    assert files_of(copied / "out") == before
    Path(shards[0]).unlink()  # its pairs are made again, the others not
    assert run(*flags(checkpoint, *more), cwd=copied).returncode == 0
    again = list(
        wds.WebDataset(sorted(str(p) for p in (copied / "out").glob("*.tar")), shardshuffle=False)
    )
    assert sorted(s["__key__"] for s in again) == list("abcd")


@pytest.mark.parametrize("more", [(), ("--format", "webdataset", "--per-shard", "2")])
def test_kill_9_in_mid_run_loses_nothing(finished, copied, checkpoint, more):
    expected = {k: v for k, v in files_of(copied / "out").items() if k.endswith("r.png")}
    for i in range(8):
        shutil.copy(copied / "hr" / "a.png", copied / "hr" / f"e{i}.png")
    shutil.rmtree(copied / "out")
    command = [str(a) for a in (sys.executable, REPO / "generate.py", *flags(checkpoint, *more))]
    process = subprocess.Popen(
        command, cwd=copied, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    table, deadline = copied / "out/pairs.0.jsonl", time.time() + 100
    while time.time() < deadline and process.poll() is None:
        if table.is_file() and table.read_text().count("\n") >= 3:
            break
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = table.read_text().count("\n") if table.is_file() else 12  # else it was too quick
    done = run(*flags(checkpoint, *more), cwd=copied)
    assert done.returncode == 0, done.stderr
    assert "12 pairs" in done.stdout and lines >= 3
    records = [json.loads(line) for line in open(copied / "out/pairs.jsonl")]
    assert [Path(r["lr"]).stem for r in records] == sorted(
        {p.stem for p in (copied / "hr").iterdir()}
    )
    if not more:
        now = files_of(copied / "out")
        assert all(now[name] == data for name, data in expected.items())
    else:
        assert set(tars.TarShards(copied / "out").done()) == {Path(r["lr"]).stem for r in records}

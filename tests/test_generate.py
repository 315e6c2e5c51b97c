"""generate.py: the filter, the start image, sizes; the command line on all kinds of images."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
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
from generate import Sampler
from tests.fake_cuda import fake_cuda

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

PLAIN = Sampler(t_start=0, grain=False)  # Rec_lr's answer


def test_any_size_gives_a_quarter_of_it(net):
    hr = common.crop_to_multiple(uniform(3, 37, 50), generate.SCALE, "x")[None]
    assert hr.shape == (1, 3, 36, 48)
    sampler = Sampler(t_start=10, num_steps=2, candidates=3)
    lr, scores = generate.generate(net, hr, [uniform(3, 17, 20)], sampler, [0])
    assert lr.shape == (1, 3, 3, 9, 12)
    assert 0 <= lr.min() and lr.max() <= 1 and lr.isfinite().all()
    assert scores["content"].shape == scores["degradation"].shape == (1, 3)
    assert 0 <= scores["kept"][0] < 3


def test_no_noise_steps_give_rec_lr_s_answer(net):
    hr, refs = uniform(2, 3, 40, 48), [uniform(3, 16, 20), uniform(3, 30, 18, seed=1)]
    lr, scores = generate.generate(net, hr, refs, replace(PLAIN, num_steps=10), (0, 1))
    codes = torch.cat([net.extractors.e_deg(ref[None]) for ref in refs])
    expected = net.extractors.reconstruct(codes, hr, net.extractors.content(hr)).clamp(0, 1)
    assert lr.shape == (2, 1, 3, 10, 12) and scores["kept"].tolist() == [0, 0]
    torch.testing.assert_close(lr[:, 0], expected)
    lr, _ = generate.generate(net, hr, refs, replace(PLAIN, candidates=3), (0, 1))
    torch.testing.assert_close(lr, expected[:, None].expand(-1, 3, -1, -1, -1))


def test_errors_are_computed_where_there_is_a_choice_or_someone_asks(net, monkeypatch):
    hr, refs, calls = uniform(2, 3, 32, 32), [uniform(3, 16, 16)] * 2, []
    original = generate.errors
    monkeypatch.setattr(generate, "errors", lambda *a: calls.append(1) or original(*a))
    for candidates, scored in ((1, False), (1, True), (2, False)):
        sampler = Sampler(candidates=candidates)
        _, scores = generate.generate(net, hr, refs, sampler, (0, 1), scored)
        wanted = scored or candidates > 1
        assert set(scores) == {"kept"} | ({"content", "degradation"} if wanted else set())
        assert bool(calls) == wanted
        if wanted:
            assert scores["content"].shape == scores["degradation"].shape == (2, candidates)
        calls.clear()


def test_reference_image_and_seed_matter(net):
    hr, ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    sampler = Sampler(t_start=20, num_steps=2, candidates=2)
    lr = generate.generate(net, hr, [ref], sampler, (5,))[0]
    assert torch.equal(lr, generate.generate(net, hr, [ref], sampler, (5,))[0])
    assert not torch.equal(lr[:, 0], lr[:, 1])  # candidates differ
    for other in (
        generate.generate(net, hr, [1 - ref / 2], sampler, (5,)),
        generate.generate(net, 1 - hr, [ref], sampler, (5,)),
        generate.generate(net, hr, [ref], sampler, (6,)),
        generate.generate(net, hr, [ref], replace(sampler, start="realesrgan"), (5,)),
    ):
        assert (lr - other[0]).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["realesrgan", "light"])
def test_a_degraded_start_is_d_of_the_hr_image(net, start):
    hr, refs = uniform(2, 3, 64, 64), [uniform(3, 16, 16)] * 2
    lr = generate.generate(net, hr, refs, replace(PLAIN, start=start), (3, 4))[0]
    for b, seed in enumerate((3, 4)):
        theta = degrade.sample_degradation(1, start, generator=common.generator(seed))
        expected = degrade.degrade(hr[b : b + 1], theta)
        torch.testing.assert_close(lr[b], expected, atol=1e-6, rtol=0)


def lengths_of_chains(net, monkeypatch, sampler: Sampler, seeds: range) -> list[list[int]]:
    """T of the candidates of each image."""
    chains = []

    def sample(function, start, c, t_start, num_steps, generators, eta):
        assert (num_steps, eta) == (sampler.num_steps, sampler.eta)
        chains.append(list(t_start))
        return start

    monkeypatch.setattr(generate.diffusion, "sample", sample)
    hr = uniform(1, 3, 32, 32)
    for seed in seeds:
        generate.generate(net, hr, [uniform(3, 16, 16)], sampler, [seed])
    return chains


@pytest.mark.parametrize("preset", ["paper", "syndiff"])
def test_behind_d_each_image_draws_its_t(net, monkeypatch, preset):
    """The paper: from 0 to T. A candidate has the T of its image."""
    cfg = generate.Config(**generate.PRESETS[preset])
    assert cfg.t_start == {"paper": 300, "syndiff": 250}[preset]
    assert (cfg.num_steps, cfg.eta) == {"paper": (300, 1.0), "syndiff": (12, 0.0)}[preset]
    chains = lengths_of_chains(net, monkeypatch, cfg, range(60))
    assert all(len(ts) == cfg.candidates and len(set(ts)) == 1 for ts in chains)
    drawn = [ts[0] for ts in chains]
    assert drawn == [ts[0] for ts in lengths_of_chains(net, monkeypatch, cfg, range(60))]
    assert all(0 <= t <= cfg.t_start for t in drawn) and len(set(drawn)) > 40
    for quarter in range(4):
        low = quarter * cfg.t_start / 4
        assert 6 <= sum(low <= t < low + cfg.t_start / 4 for t in drawn) <= 26
    few = lengths_of_chains(net, monkeypatch, replace(cfg, t_start=2), range(30))
    assert {ts[0] for ts in few} == {0, 1, 2}  # both ends, too


def test_rec_lr_s_answer_is_always_noised_to_t(net, monkeypatch):
    sampler = Sampler(t_start=7, num_steps=3, candidates=2)
    assert lengths_of_chains(net, monkeypatch, sampler, range(9)) == [[7, 7]] * 9


def test_an_image_does_not_depend_on_the_others_of_a_call(net):
    hr, refs = uniform(3, 3, 40, 48), [uniform(3, 16, 20, seed=i) for i in range(3)]
    for start in generate.STARTS:
        sampler = Sampler(start, t_start=20, num_steps=3, candidates=2)
        lr, scores = generate.generate(net, hr, refs, sampler, (4, 5, 6))
        for b in range(3):
            rows = slice(b, b + 1)
            alone, own = generate.generate(net, hr[rows], refs[rows], sampler, (4 + b,))
            assert torch.equal(alone[0], lr[b])
            assert all(torch.equal(own[key][0], scores[key][b]) for key in scores)


def test_a_reference_may_be_given_by_its_code(net):
    hr, ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    code = net.extractors.e_deg(ref[None])[0]
    sampler = Sampler(t_start=20, num_steps=2, candidates=2)
    lr = generate.generate(net, hr, [ref], sampler, [0])[0]
    assert torch.equal(generate.generate(net, hr, [code], sampler, [0])[0], lr)


def test_of_a_large_reference_whole_blocks_of_jpeg_are_read(net):
    """Its code is that of a crop which begins at a multiple of 8, whatever its size."""
    for height, width, top, left in ((1080, 776, 280, 128), (520, 513, 0, 0), (3000, 90, 1240, 0)):
        lr_ref = uniform(3, height, width)
        crop = lr_ref[:, top : top + 512, left : left + 512]
        assert torch.equal(generate.code_of(net, lr_ref), generate.code_of(net, crop))


def reads(net, lr_ref: Tensor, of_reference: tuple, of_others: tuple):
    """A head that reads noise (levels) and JPEG quality like this in a reference, and in others."""
    code = generate.code_of(net, lr_ref)

    def named(found: Tensor) -> tuple[Tensor, Tensor]:
        read = [of_reference if torch.equal(row, code[0]) else of_others for row in found]
        noise, quality = torch.tensor(read).T
        return noise / 255, quality.long()

    return named


def test_grain_is_the_noise_that_an_image_lacks(net, monkeypatch):
    hr, lr_ref = uniform(1, 3, 256, 256) / 2 + 0.25, [uniform(3, 40, 40)]
    grain = replace(PLAIN, grain=True)
    plain = generate.generate(net, hr, lr_ref, PLAIN, [0])[0]
    for wanted, there, added in ((10, 0, 10), (5, 3, 4), (5, 6, 0), (3, 0, 0)):
        head = reads(net, lr_ref[0], (wanted, 100), (there, 100))
        monkeypatch.setattr(net.extractors, "named", head)
        noisy, again = (generate.generate(net, hr, lr_ref, grain, [0])[0] for _ in range(2))
        inside = (plain > 0.2) & (plain < 0.8)  # where nothing is clipped
        std = (255 * (noisy - plain)[inside]).std().item()
        assert std == pytest.approx(added, rel=0.05, abs=1e-3)
        assert torch.equal(noisy, again)
        other = generate.generate(net, hr, lr_ref, grain, [1])[0]
        assert torch.equal(noisy, other) == (added == 0)


def test_each_candidate_has_its_own_grain(net, monkeypatch):
    hr, lr_ref = uniform(1, 3, 64, 64), [uniform(3, 40, 40)]
    monkeypatch.setattr(net.extractors, "named", reads(net, lr_ref[0], (10, 100), (0, 100)))
    lr = generate.generate(net, hr, lr_ref, Sampler(t_start=0, candidates=2), [0])[0][0]
    assert (lr[0] - lr[1]).std() > 8 / 255


def test_weights_as_printed_generate_and_read_no_grain(tmp_path):
    stage_1, stage_2 = (replace(cfg, as_printed=True) for cfg in (STAGE_1, STAGE_2))
    printed = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    config = asdict(stage_2) | {"extractors": asdict(stage_1)}
    torch.save({"ema": printed.state_dict(), "config": config}, tmp_path / "last.pt")
    net = generate.load_generator(str(tmp_path / "last.pt"), torch.device("cpu"))
    hr, lr_ref = uniform(1, 3, 32, 32), [uniform(3, 16, 16)]
    sampler = Sampler(t_start=10, num_steps=2, candidates=2, grain=False)
    lr = generate.generate(net, hr, lr_ref, sampler, [0])[0]
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
        sampler = Sampler(t_start=t_start, num_steps=2, candidates=2)
        plain = generate.generate(net, hr, lr_ref, replace(sampler, grain=False), [0])[0]
        for quality, changed in ((40, True), (100, False)):
            head = reads(net, lr_ref[0], (0, quality), (0, 100))
            monkeypatch.setattr(net.extractors, "named", head)
            made = generate.generate(net, hr, lr_ref, sampler, [0])[0]
            assert torch.equal(made, plain) != changed
            jpeg = degrade.jpeg(plain[0], torch.full((len(plain[0]),), quality))
            assert torch.equal(made[0], jpeg) == changed


def test_noise_that_compression_looks_like_is_not_added(net, monkeypatch):
    """What is lacking is judged against the candidate once compressed, not before."""
    hr, lr_ref = uniform(1, 3, 128, 128), [uniform(3, 40, 40)]
    plain = generate.generate(net, hr, lr_ref, PLAIN, [0])[0][0]
    jpeg = degrade.jpeg(plain, torch.tensor([50]))
    codes = {"reference": generate.code_of(net, lr_ref[0]), "jpeg": net.extractors.e_deg(jpeg)}

    def named(found: Tensor) -> tuple[Tensor, Tensor]:
        known = any(torch.allclose(found, code, atol=1e-6) for code in codes.values())
        return torch.full((len(found),), 8 / 255 * known), torch.full((len(found),), 50)

    monkeypatch.setattr(net.extractors, "named", named)
    made = generate.generate(net, hr, lr_ref, replace(PLAIN, grain=True), [0])[0][0]
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
    whole = generate.generate(net, hr, [ref], Sampler(t_start=20, num_steps=3), [0])[0][0, 0]
    monkeypatch.setattr(extractors, "TILE", 32)
    monkeypatch.setattr(extractors, "OVERLAP", 8)
    tiled = generate.generate(net, hr, [ref], Sampler(t_start=20, num_steps=3), [0])[0][0, 0]
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    steps = (tiled - whole).diff(dim=2).abs().mean((0, 1))  # (w - 1,)
    border = torch.zeros_like(steps, dtype=torch.bool)
    border[[23, 24, 31, 32]] = True  # where a tile begins or ends
    assert steps[border].mean() < 2 * steps[~border].mean()


# ---- the filter -------------------------------------------------------------------------------


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
    sampler = Sampler(t_start=10, num_steps=2, candidates=4, grain=False)
    lr, scores = generate.generate(net, hr, [reference], sampler, [0])
    assert scores["kept"].tolist() == [good]
    assert torch.equal(lr[0], planted[..., :9, :12])
    assert torch.equal(generate.chosen(lr, scores), planted[good : good + 1])


def test_filter_weighs_both_errors_equally(net, monkeypatch):
    tables = {
        # Relative to their means: content (0.5, 0.8, 1.7), degradation (1.7, 0.8, 0.5).
        "both": (torch.tensor([0.5, 0.8, 1.7]), torch.tensor([170.0, 80.0, 50.0])),
        "zero": (torch.zeros(3), torch.tensor([3.0, 1.0, 2.0])),
    }
    for table in tables.values():
        monkeypatch.setattr(generate, "errors", lambda *_, table=table: table)
        sampler = Sampler(t_start=5, candidates=3)
        facts = uniform(1, 3, 32, 32), [uniform(3, 16, 16)], sampler, [0]
        assert generate.generate(net, *facts)[1]["kept"].tolist() == [1]


def test_chosen_takes_of_each_image_the_candidate_that_is_kept():
    lr = uniform(3, 4, 3, 2, 2)
    kept = torch.tensor([2, 0, 3])
    picked = generate.chosen(lr, {"kept": kept})
    assert all(torch.equal(picked[b], lr[b, k]) for b, k in enumerate(kept))


# ---- references ---------------------------------------------------------------------------------


def references_of(net, files: list[Path], average: int = 1, usable: bool = True):
    """References, of which none needs to exist if all are `usable`."""
    names = [file.name for file in files]
    references = generate.References(files, names, net, average)
    if usable:
        references.codes = {r: torch.zeros(1) for r in range(len(files))}
    return references


def drawn(net, names: list[str], seeds: range) -> list[str]:
    """Names of the references drawn with these seeds."""
    references = references_of(net, [Path(name) for name in names])
    seeds_ = [common.generator(0, f"photo {i}").initial_seed() for i in seeds]
    return [names[references.draw(seed)] for seed in seeds_]


@pytest.mark.parametrize("count", [4, 49])
def test_references_are_drawn_evenly(net, count):
    """By chi-square over photos; the draws of one photo are the same in every run."""
    names = [f"data/lr/phone/IMG_{i:04d}.jpg" for i in range(count)]
    found = Counter(drawn(net, names, range(4000)))
    expected = 4000 / count
    statistic = sum((found[name] - expected) ** 2 / expected for name in names)
    assert statistic < count + 4 * (2 * count) ** 0.5
    assert drawn(net, names, range(50)) == drawn(net, names, range(50))


@pytest.mark.parametrize("count", [4, 49])
def test_one_reference_more_or_less_changes_only_its_own_draws(net, count):
    """Of n + 1 it takes about 1 / (n + 1) of all, and no two others exchange theirs."""
    names = [f"data/lr/phone/IMG_{i:04d}.jpg" for i in range(count)]
    before = drawn(net, names, range(4000))
    for place in (0, count // 2, count):
        more = [*names[:place], "data/lr/new.jpg", *names[place:]]
        after = drawn(net, more, range(4000))
        changed = [new for old, new in zip(before, after, strict=True) if old != new]
        assert set(changed) == {"data/lr/new.jpg"}
        share, expected = len(changed) / 4000, 1 / (count + 1)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_a_reference_that_cannot_be_read_is_said_once_and_never_drawn(net, tmp_path, capsys):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        common.save_image(file, uniform(3, 20, 20, seed=i))
    files[1].write_text("not an image")
    common.save_image(files[2], uniform(3, 15, 40))
    references = references_of(net, files, usable=False)
    assert {references.draw(seed) for seed in range(60)} == {0, 3}
    said = capsys.readouterr().out
    assert said.count("skipped: ") == 2 and "16 x 16" in said
    assert all(f"skipped: {file}: " in said for file in files[1:3])
    none = references_of(net, files[1:3], usable=False)
    with pytest.raises(common.UserError, match="--lr-ref"):
        none.draw(0)


def test_the_codes_of_a_folder_are_averaged_from_the_reference_on(net, tmp_path):
    files = [tmp_path / name for name in ("a/1.png", "a/2.png", "a/3.png", "a/4.png", "b/1.png")]
    for i, file in enumerate(files):
        common.save_image(file, uniform(3, 32, 32, seed=i))
    files[3].write_text("not an image")
    references = references_of(net, files, usable=False)
    first, second, third, _, alone = (references.code(r) for r in range(5))

    def mean_code(r: int, average: int) -> Tensor | None:
        return references_of(net, files, average, usable=False).mean_code(r)

    assert torch.equal(mean_code(1, 1), second)
    assert torch.allclose(mean_code(1, 2), (second + third) / 2)
    assert torch.allclose(mean_code(1, 3), mean_code(1, 2))  # the fourth can't be read
    assert torch.allclose(mean_code(1, 99), (first + second + third) / 3)
    assert torch.equal(mean_code(4, 99), alone)
    assert mean_code(3, 99) is None


# ---- the plan of a run ------------------------------------------------------------------------


def planned(pairing: str, photos: str = "abc", refs: str = "rs") -> list[generate.Job]:
    cfg = generate.Config(hr=("hr",), lr_ref=("x",), pairing=pairing)
    files = [Path(f"hr/{name}.png") for name in photos]
    return generate.plan(cfg, files, [Path(f"x/{name}.jpg") for name in refs])


def test_pairings_plan_every_pair():
    assert [(job.name, job.reference) for job in planned("random")] == [
        (name, None) for name in "abc"
    ]
    turns = planned("round-robin")
    assert [(job.name, job.reference) for job in turns] == [("a", 0), ("b", 1), ("c", 0)]
    every = planned("all")
    assert [(job.name, job.reference) for job in every[:3]] == [
        ("a--r", 0),
        ("a--s", 1),
        ("b--r", 0),
    ]
    assert len({job.name for job in every}) == len({job.seed for job in every}) == 6


@pytest.mark.parametrize("pairing", ["random", "all"])
def test_what_a_pair_draws_depends_on_its_names_alone(pairing):
    """Not on its place, nor on the photos and references beside it."""
    few = {job.name: job.seed for job in planned(pairing)}
    many = {job.name: job.seed for job in planned(pairing, "abcde", "qrst")}
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many)


def test_images_of_equal_size_go_together_and_none_is_left_behind():
    sizes = [(i % 3 + 1) * 8 for i in range(50)]
    jobs = [
        generate.Job(str(i), Path("x"), i, hr=torch.zeros(3, 8, size))
        for i, size in enumerate(sizes)
    ]
    made = list(generate.batches(jobs, 4 * 8 * 16))
    assert sorted(int(job.name) for batch in made for job in batch) == list(range(50))
    for batch in made:
        assert len({job.hr.shape for job in batch}) == 1
        pixels = [job.hr[0].numel() for job in batch]
        assert sum(pixels[:-1]) < 4 * 8 * 16
    assert Counter(map(len, made)).most_common(1)[0][0] >= 3


def test_images_of_many_sizes_do_not_fill_the_memory():
    taken, given = [], 0

    def jobs():
        for size in range(8, 1000):
            taken.append(size)
            yield generate.Job(str(size), Path("x"), size, hr=torch.zeros(3, 8, size))

    for batch in generate.batches(jobs(), 10**9):
        assert len(taken) - given < 300
        given += len(batch)
    assert given == len(taken) == 992


# ---- the command line -------------------------------------------------------------------------

SIDES = ("hr", "lr")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    """`generate.py args` in this process: a new one takes seconds to import torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        try:
            common.launch(generate.main, generate.Config, generate.PRESETS, "")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_apart(*args: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python args` in a new process."""
    command = [sys.executable, *map(str, args)]
    env = ENVIRONMENT | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def begun(cwd: Path, *args: object) -> multiprocessing.process.BaseProcess:
    """`generate.py args`, begun in a process that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["generate"])
    process = context.Process(target=alone, args=(cwd, *map(str, args)))
    process.start()
    return process


def alone(cwd: Path, *args: str) -> None:
    torch.set_num_threads(1)
    sys.exit(run(*args, cwd=cwd).returncode)


def waited_for(condition: Callable[[], object], seconds: float = 120) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(true)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def times_of(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one sentence that names what is wrong."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


def assert_made(done: subprocess.CompletedProcess, count: int, skipped: int = 0) -> None:
    assert done.returncode == 0, done.stderr
    assert f"{count} pairs in " in done.stdout, done.stdout
    assert f"{skipped} images skipped" in done.stdout, done.stdout


def assert_agrees(out: Path) -> None:
    """The images, pairs.jsonl and both lists tell of the same pairs, and there is nothing else."""
    rows = [row for row in rows_of(out) if not row["dropped"]]
    names = [row["lr"].removeprefix("lr/") for row in rows]
    for side in ("hr", "lr"):
        assert sorted(p.name for p in (out / side).iterdir()) == sorted(names)
        assert [row[side] for row in rows] == [f"{side}/{name}" for name in names]
    lines = (out / "meta_info.txt").read_text().splitlines()
    assert lines == names
    lines = (out / "meta_info_realesrgan.txt").read_text().splitlines()
    assert lines == [f"hr/{name}, lr/{name}" for name in names]
    others = {"hr", "lr", "pairs.jsonl", "meta_info.txt", "meta_info_realesrgan.txt"}
    assert {p.name for p in out.iterdir()} - {"removed"} == others | {"preview.png"}


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
    method = ["--t-start", 20, "--num-steps", 2, "--candidates", 4, "--device", "cpu"]
    return [*paths, *method, *more]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished folder that a test may change."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def inputs(copied):
    """The same without pairs."""
    shutil.rmtree(copied / "out")
    return copied


def test_a_folder_becomes_aligned_pairs(finished):
    folder, done = finished
    out = folder / "out"
    assert_made(done, 4)
    assert "out/preview.png" in done.stdout
    names = ["a.png", "b.png", "c.png", "d.png"]
    assert sorted(p.name for p in (out / "lr").iterdir()) == names
    assert_agrees(out)
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
    records = rows_of(folder / "out")
    assert [r["lr"] for r in records] == [f"lr/{name}.png" for name in "abcd"]
    for record in records:
        assert all((folder / record[key]).is_file() for key in ("source", "lr_ref"))
        assert len(record["content_errors"]) == len(record["degradation_errors"]) == 4
        assert 0 <= record["kept"] < 4
        assert (record["seed"], record["t_start"], record["num_steps"]) == (0, 20, 2)
        assert (record["start"], record["dropped"]) == ("reconstruct", False)


def test_a_pair_is_what_the_method_makes_of_its_photo_and_reference(finished, net):
    """Of the file that is written, of 8 bits, with the seed of the pair's name."""
    folder = finished[0]
    sampler = Sampler(t_start=20, num_steps=2, candidates=4)
    for record in rows_of(folder / "out"):
        hr = common.load_image(folder / "out" / record["hr"])[None]
        seed = common.generator(0, Path(record["lr"]).stem).initial_seed()
        lr_ref = common.load_image(folder / record["lr_ref"])
        lr = generate.chosen(*generate.generate(net, hr, [lr_ref], sampler, [seed]))[0]
        written = common.load_image(folder / "out" / record["lr"])
        assert torch.equal(common.to_uint8(lr), common.to_uint8(written))


def test_a_second_run_changes_no_byte(copied, checkpoint):
    before, times = files_of(copied / "out"), times_of(copied / "out")
    assert_made(run(*flags(checkpoint), cwd=copied), 4)
    assert files_of(copied / "out") == before
    assert times_of(copied / "out").items() >= times.items()


def test_a_deleted_file_comes_back_identical(copied, checkpoint):
    before = files_of(copied / "out")
    for name in ("lr/c.png", "hr/a.png", "preview.png", "meta_info.txt", "pairs.jsonl"):
        if name == "pairs.jsonl":  # which names the others
            shutil.rmtree(copied / "out" / "hr")
            shutil.rmtree(copied / "out" / "lr")
        (copied / "out" / name).unlink()
        assert_made(run(*flags(checkpoint), cwd=copied), 4)
        assert files_of(copied / "out") == before


def test_other_settings_or_weights_need_another_folder(copied, checkpoint):
    before = files_of(copied / "out")
    state = common.load_checkpoint(checkpoint)
    state["ema"] = {key: value + 0.01 for key, value in state["ema"].items()}
    torch.save(state, copied / "other.pt")
    for more, word in (
        (("--checkpoint", "other.pt"), "weights"),
        (("--seed", 1), "seed"),
        (("--pairing", "round-robin"), "pairing"),
        (("--max-error", 1, 1), "max_error"),
        (("--t-start", 21, "--eta", 1), "t_start, eta"),
    ):
        assert_refused(run(*flags(checkpoint, *more), cwd=copied), f"({word})", "--out")
        assert files_of(copied / "out") == before


def test_folders_of_other_programs_are_named_and_kept(inputs, checkpoint):
    common.save_image(inputs / "mine" / "hr" / "holiday.png", uniform(3, 32, 32))
    rows = {"degraded": '{"hr": "hr/a.png", "lr": "lr/a.png", "theta": {}}', "foreign": '{"a": 1}'}
    for name, row in rows.items():
        (inputs / name).mkdir()
        (inputs / name / "pairs.jsonl").write_text(row + "\n")
    words = {"mine": "holiday.png", "degraded": "another command", "foreign": "another program"}
    for name, word in words.items():
        before = files_of(inputs / name)
        assert_refused(run(*flags(checkpoint), "--out", name, cwd=inputs), word, "--out")
        assert files_of(inputs / name) == before


def test_unreadable_images_are_skipped_and_counted(inputs, checkpoint):
    (inputs / "hr" / "b.png").write_text("This is not an image.")
    image = Image.fromarray(pixels(64, 64))
    image.save(inputs / "hr" / "e.jpg")
    data = (inputs / "hr" / "e.jpg").read_bytes()
    (inputs / "hr" / "e.jpg").write_bytes(data[: len(data) // 2])
    Image.fromarray(pixels(20, 64)).save(inputs / "hr" / "f.png")
    (inputs / "hr" / "notes.txt").write_text("Not an image by name: no mention.")
    (inputs / "refs" / "r1.jpg").write_bytes(b"")
    Image.fromarray(pixels(8, 8)).save(inputs / "refs" / "r2.png")
    done = run(*flags(checkpoint), cwd=inputs)
    assert_made(done, 3, skipped=3)
    assert sorted(p.name for p in (inputs / "out" / "lr").iterdir()) == ["a.png", "c.png", "d.png"]
    for name in ("b.png", "e.jpg", "f.png"):
        assert name in done.stdout + done.stderr
    assert "notes.txt" not in done.stdout + done.stderr
    assert {Path(r["lr_ref"]).name for r in rows_of(inputs / "out")} == {"r0.jpg"}


def test_all_kinds_of_images_are_handled(inputs, checkpoint):
    shutil.rmtree(inputs / "hr")
    (inputs / "hr").mkdir()
    color = pixels(64, 48)
    image = Image.fromarray(color)
    image.convert("L").save(inputs / "hr" / "gray.png")
    image.convert("P").save(inputs / "hr" / "palette.png")
    rgba = np.concatenate([color, color[..., :1]], axis=2)
    Image.fromarray(rgba).save(inputs / "hr" / "alpha.png")
    Image.fromarray(color[..., 0].astype(np.uint16) * 257).save(inputs / "hr" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: 48 x 64 becomes 64 x 48
    Image.fromarray(pixels(48, 64)).save(inputs / "hr" / "lying.jpg", exif=exif, quality=95)
    assert_made(run(*flags(checkpoint, "--candidates", 1), cwd=inputs), 5)
    for name in ("gray", "palette", "alpha", "deep", "lying"):
        hr, lr = (Image.open(inputs / "out" / side / f"{name}.png") for side in ("hr", "lr"))
        assert (hr.mode, hr.size, lr.mode, lr.size) == ("RGB", (48, 64), "RGB", (12, 16)), name
    written = {p.stem: np.asarray(Image.open(p)) for p in (inputs / "out" / "hr").iterdir()}
    gray, deep, upright = (written[name] for name in ("gray", "deep", "lying"))
    assert (gray == gray[..., :1]).all()
    np.testing.assert_array_equal(deep, np.repeat(color[..., :1], 3, axis=2))
    assert np.abs(upright.astype(float) - np.rot90(pixels(48, 64), -1)).mean() < 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--start", "foo"], ["--start", "foo"]),
        (["--t-start", "-1"], ["--t-start", "-1"]),
        (["--t-start", "501"], ["--t-start", "501"]),
        (["--candidates", "0"], ["--candidates", "0"]),
        (["--average", "0"], ["--average", "0"]),
        (["--eta", "2"], ["--eta", "2"]),
        (["--pairing", "foo"], ["--pairing", "foo"]),
        (["--pairing", "pairs.txt"], ["--pairing", "pairs.txt"]),
        (["--max-error", "1"], ["--max-error"]),
        (["--hr", "missing"], ["--hr", "missing"]),
        (["--hr", "empty"], ["--hr", "empty"]),
        (["--lr-ref", "empty"], ["--lr-ref", "empty"]),
        (["--checkpoint", "missing.pt"], ["--checkpoint", "missing.pt"]),
        (["--checkpoint", "torn.pt"], ["torn.pt"]),
        (["--checkpoint", "stage_1.pt"], ["stage_1.pt", "diffusion.py"]),
    ],
)
def test_senseless_input_is_refused_and_nothing_written(inputs, checkpoint, more, words):
    (inputs / "empty").mkdir()
    (inputs / "pairs.txt").write_text("a.png\tr0.jpg\n")
    (inputs / "torn.pt").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"ema": {}, "config": asdict(STAGE_1)}, inputs / "stage_1.pt")
    before = files_of(inputs)
    assert_refused(run(*flags(checkpoint, *more), cwd=inputs), *words)
    assert files_of(inputs) == before and not (inputs / "out").exists()


def test_missing_weights_name_the_command_that_makes_them(inputs, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(inputs / "common.py"))  # no data/pretrained there
    argv = [a for a in flags(Path()) if a not in ("--checkpoint", Path())]
    before = files_of(inputs)
    assert_refused(run(*argv, cwd=inputs), "python diffusion.py")
    assert files_of(inputs) == before and not (inputs / "out").exists()


def test_no_usable_image_or_reference_at_all_is_an_error(inputs, checkpoint):
    for kind, words in (("refs", ("--lr-ref",)), ("hr", ("none of the HR images",))):
        shutil.copytree(inputs / kind, inputs / "sound")
        for file in (inputs / kind).iterdir():
            file.write_text("This is not an image.")
        assert_refused(run(*flags(checkpoint), cwd=inputs), *words)
        assert not (inputs / "out").exists()
        shutil.rmtree(inputs / kind)
        (inputs / "sound").rename(inputs / kind)


# ---- what is in the folder is what was asked for ----------------------------------------------


def test_photos_that_come_and_go_cost_only_themselves(copied, checkpoint):
    """One is added before all others, one moved into a folder, one taken away, one changed."""
    out = copied / "out"
    before, times = files_of(out), times_of(out)
    Image.fromarray(pixels(64, 48, 3)).save(copied / "hr" / "Aa.png")
    (copied / "hr" / "moved").mkdir()
    (copied / "hr" / "b.png").rename(copied / "hr" / "moved" / "b.png")
    (copied / "hr" / "c.png").unlink()
    done = run(*flags(checkpoint), cwd=copied)
    assert_made(done, 4)
    assert "2 pairs" in done.stdout and str(Path("out/removed")) in done.stdout
    assert_agrees(out)
    assert {p.stem for p in (out / "lr").iterdir()} == {"Aa", "a", "d", "moved_b"}
    after = times_of(out)
    for name in ("a", "d"):
        for side in SIDES:
            assert after[f"{side}/{name}.png"] == times[f"{side}/{name}.png"]
    removed = files_of(out / "removed")
    assert removed == {f"{side}/{n}.png": before[f"{side}/{n}.png"] for n in "bc" for side in SIDES}
    # And it is what a run into a new folder makes.
    assert_made(run(*flags(checkpoint), "--out", "new", cwd=copied), 4)
    shutil.rmtree(out / "removed")
    assert files_of(out) == files_of(copied / "new")


def test_a_photo_that_is_replaced_or_another_of_its_name_is_made_anew(copied, checkpoint):
    shutil.copytree(copied / "hr", copied / "other")
    Image.fromarray(pixels(64, 48, 9)).save(copied / "other" / "b.png")
    Image.fromarray(pixels(64, 48, 8)).save(copied / "hr" / "c.png")
    assert_made(run(*flags(checkpoint), cwd=copied), 4)
    hr = np.asarray(Image.open(copied / "out" / "hr" / "c.png"))
    np.testing.assert_array_equal(hr, pixels(64, 48, 8))
    assert_made(run(*flags(checkpoint), "--hr", "other", cwd=copied), 4)
    hr = np.asarray(Image.open(copied / "out" / "hr" / "b.png"))
    np.testing.assert_array_equal(hr, pixels(64, 48, 9))
    assert not (copied / "out" / "removed").exists()


def test_the_preview_shows_the_pairs_that_are_there(inputs, checkpoint):
    """Also where no row of the table has changed, and where a killed run had no time for it."""
    facts = flags(checkpoint, "--candidates", 1)
    run(*facts, cwd=inputs)
    out = inputs / "out"
    before = files_of(out)
    Image.fromarray(pixels(64, 48, 8)).save(inputs / "hr" / "b.png")
    assert_made(run(*facts, cwd=inputs), 4)
    now = files_of(out)
    assert now["pairs.jsonl"] == before["pairs.jsonl"]
    assert now["preview.png"] != before["preview.png"]
    lines = now["pairs.jsonl"].decode().splitlines(keepends=True)
    (out / "pairs.jsonl").write_text("".join(lines[:3]))
    (out / "pairs.0.jsonl").write_text(lines[3])
    (out / "preview.png").write_bytes(before["preview.png"])
    (out / "meta_info.txt").write_text("of before\n")
    assert_made(run(*facts, cwd=inputs), 4)
    assert files_of(out) == now


def test_a_run_on_fewer_photos_leaves_their_pairs_alone_and_sets_the_others_aside(
    copied, checkpoint
):
    before, times = files_of(copied / "out"), times_of(copied / "out")
    assert_made(run(*flags(checkpoint), "--hr", "hr/b.png", cwd=copied), 1)
    assert_agrees(copied / "out")
    assert times_of(copied / "out")["lr/b.png"] == times["lr/b.png"]
    removed = files_of(copied / "out" / "removed")
    assert removed == {f"{s}/{n}.png": before[f"{s}/{n}.png"] for n in "acd" for s in SIDES}


def test_a_reference_that_is_added_costs_only_the_pairs_that_draw_it(inputs, checkpoint):
    for i in range(12):
        Image.fromarray(pixels(36, 36, i)).save(inputs / "hr" / f"e{i}.png")
    more = ("--candidates", 1)
    assert_made(run(*flags(checkpoint, *more), cwd=inputs), 16)
    before = {row["lr"]: row["lr_ref"] for row in rows_of(inputs / "out")}
    times = times_of(inputs / "out")
    Image.fromarray(pixels(20, 24, 7)).save(inputs / "refs" / "a.jpg")
    assert_made(run(*flags(checkpoint, *more), cwd=inputs), 16)
    after = {row["lr"]: row["lr_ref"] for row in rows_of(inputs / "out")}
    changed = {name for name in after if after[name] != before[name]}
    assert 0 < len(changed) < 12 and {after[name] for name in changed} == {"refs/a.jpg"}
    now = times_of(inputs / "out")
    assert {name for name in after if now[name] != times[name]} == changed
    assert_made(run(*flags(checkpoint, *more), "--out", "new", cwd=inputs), 16)
    assert files_of(inputs / "out") == files_of(inputs / "new")


def test_names_that_differ_only_in_case_do_not_collide(inputs, checkpoint):
    """On a disk that takes them for one, or once the pairs are copied to such a one."""
    for i, name in enumerate(("A.png", "x/b.PNG", "x_B.jpg")):
        (inputs / "hr" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(64, 48, i)).save(inputs / "hr" / name)
    shutil.copy(inputs / "hr" / "d.png", inputs / "hr" / "d.bmp.png")
    Image.fromarray(pixels(64, 48, 5)).save(inputs / "hr" / "d.bmp")
    for _ in range(2):
        assert_made(run(*flags(checkpoint, "--candidates", 1), cwd=inputs), 9)
        assert_agrees(inputs / "out")
        names = [p.name for p in (inputs / "out" / "lr").iterdir()]
        assert len({name.casefold() for name in names}) == 9
        for row in rows_of(inputs / "out"):
            assert torch.equal(
                common.load_image(inputs / "out" / row["hr"]),
                common.crop_to_multiple(common.load_image(inputs / row["source"]), 4, "x"),
            )


def test_results_inside_the_folder_of_photos_are_not_read_as_photos(inputs, checkpoint):
    for _ in range(3):
        done = run(*flags(checkpoint), "--out", "hr/pairs", cwd=inputs)
        assert_made(done, 4)
        assert_agrees(inputs / "hr" / "pairs")
    done = run(*flags(checkpoint), "--out", "hr/pairs", "--hr", "hr/pairs/hr", cwd=inputs)
    assert_refused(done, "--out")


def test_the_lists_name_files_by_the_rules_of_their_readers(inputs, checkpoint):
    """Of BasicSR, neosr and traiNNer-redux, and of Real-ESRGAN; with names of all kinds."""
    for i, name in enumerate(("my photo", "one, two", "ünï", "tab\tand  blanks ", "sub dir/x y")):
        (inputs / "hr" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(36, 36, i)).save(inputs / "hr" / f"{name}.png")
    assert_made(run(*flags(checkpoint, "--candidates", 1), cwd=inputs), 9)
    out = inputs / "out"
    with open(out / "meta_info.txt") as file:  # basicsr/data/data_util.py
        names = [line.strip().split(" ")[0] for line in file]
    assert len(set(names)) == 9
    for name in names:
        hr, lr = (Image.open(out / side / name) for side in ("hr", "lr"))
        assert hr.size == tuple(4 * side for side in lr.size)
    with open(out / "meta_info_realesrgan.txt") as file:  # realesrgan_paired_dataset.py
        paths = [line.strip() for line in file]
    assert len(paths) == 9
    for path in paths:
        gt_path, lq_path = path.split(", ")
        assert (out / gt_path).is_file() and (out / lq_path).is_file()
    assert_agrees(out)


def test_poor_pairs_are_dropped_counted_and_not_made_again(inputs, finished, checkpoint):
    records = rows_of(finished[0] / "out")
    errors = sorted(record["content_errors"][record["kept"]] for record in records)
    more = ("--max-error", (errors[1] + errors[2]) / 2, 1e9)
    done = run(*flags(checkpoint, *more), cwd=inputs)
    assert_made(done, 2)
    assert "2 dropped" in done.stdout
    before = files_of(inputs / "out")
    records = rows_of(inputs / "out")
    assert len(records) == 4 and sum(record["dropped"] for record in records) == 2
    assert_agrees(inputs / "out")
    assert_made(run(*flags(checkpoint, *more), cwd=inputs), 2)
    assert files_of(inputs / "out") == before


def test_no_preview_is_promised_where_none_is_made(inputs, checkpoint):
    """For --max-error also one candidate gets errors; here none is good enough."""
    more = ("--max-error", 0, 0, "--candidates", 1)
    done = run(*flags(checkpoint, *more), cwd=inputs)
    assert_made(done, 0)
    assert "4 dropped" in done.stdout and "look at" not in done.stdout
    assert all(len(row["content_errors"]) == 1 for row in rows_of(inputs / "out"))
    assert not list((inputs / "out").rglob("*.png"))
    assert (inputs / "out" / "meta_info.txt").read_text() == ""


def test_an_image_that_is_not_finite_is_never_written(inputs, checkpoint, monkeypatch):
    original, bad = generate.generate, {36}  # heights; that of a.png

    def spoiled(net, hr, *facts):
        lr, scores = original(net, hr, *facts)
        if hr.shape[2] in bad:
            lr = lr.clone()
            lr[..., 2, 3] = float("nan")
        return lr, scores

    monkeypatch.setattr(generate, "generate", spoiled)
    done = run(*flags(checkpoint), cwd=inputs)
    assert_made(done, 3, skipped=1)
    assert "hr/a.png" in done.stdout and "not finite" in done.stdout
    assert_agrees(inputs / "out")
    assert {p.stem for p in (inputs / "out" / "hr").iterdir()} == set("bcd")
    bad.add(64)
    assert_refused(run(*flags(checkpoint), "--out", "new", cwd=inputs), "none of the HR images")
    assert not list((inputs / "new").rglob("*.png"))


def test_all_pairs_of_photos_and_references(inputs, checkpoint):
    more = ("--pairing", "all", "--candidates", 1)
    assert_made(run(*flags(checkpoint, *more), cwd=inputs), 8)
    assert_agrees(inputs / "out")
    before, times = files_of(inputs / "out"), times_of(inputs / "out")
    assert "lr/a--r0.png" in before and before["lr/a--r0.png"] != before["lr/a--r1.png"]
    assert before["hr/a--r0.png"] == before["hr/a--r1.png"]
    Image.fromarray(pixels(20, 24, 7)).save(inputs / "refs" / "a.jpg")
    assert_made(run(*flags(checkpoint, *more), cwd=inputs), 12)
    after = times_of(inputs / "out")
    assert all(after[name] == times[name] for name in before if name.startswith("lr/"))


# ---- the same bytes ---------------------------------------------------------------------------


def test_neither_processes_nor_threads_change_a_byte(inputs, finished, checkpoint):
    """torchrun with two processes, or one of two threads: as one process of one thread."""
    expected = files_of(finished[0] / "out")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script, facts = REPO / "generate.py", flags(checkpoint)
    for launcher, threads in ((torchrun, "1"), ((), "2")):
        done = run_apart(*launcher, script, *facts, cwd=inputs, OMP_NUM_THREADS=threads)
        assert_made(done, 4)
        assert files_of(inputs / "out") == expected
        shutil.rmtree(inputs / "out")


def test_two_processes_say_once_what_is_wrong(copied, checkpoint):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    before = files_of(copied / "out")
    done = run_apart(*torchrun, REPO / "generate.py", *flags(checkpoint, "--seed", 1), cwd=copied)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    assert "other settings (seed)" in done.stderr and "RuntimeError" not in done.stderr
    assert files_of(copied / "out") == before
    other = held_lock(copied / "out" / ".lock")  # which only one of the processes looks at
    done = run_apart(*torchrun, REPO / "generate.py", *flags(checkpoint), cwd=copied)
    other.kill()
    other.wait()
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    assert "another run is writing there" in done.stderr and "RuntimeError" not in done.stderr


# ---- kill -9, and two runs at once ------------------------------------------------------------


def test_a_torn_line_does_not_swallow_the_next_one(copied, checkpoint):
    """As when a process was killed while it wrote to its own table, before all were joined."""
    out = copied / "out"
    text = (out / "pairs.jsonl").read_text()
    (out / "pairs.jsonl").unlink()
    (out / "pairs.0.jsonl").write_text(text[: len(text) - 40])  # of d's line
    assert_made(run(*flags(checkpoint), cwd=copied), 4)
    assert (out / "pairs.jsonl").read_text() == text


def many_photos(folder: Path, count: int = 20) -> list[object]:
    """More photos, and flags for a quick run."""
    for i in range(count):
        Image.fromarray(pixels(64, 64, i)).save(folder / "hr" / f"e{i:04d}.png")
    return ["--candidates", 1]


def images_in(folder: Path) -> int:
    return len(list(folder.rglob("[!.]*.png")))


def test_kill_9_at_any_moment_and_then_the_same_command_lose_nothing(inputs, checkpoint):
    """The folder equals an uninterrupted run's, byte for byte, and has no other file."""
    facts = flags(checkpoint, *many_photos(inputs))
    assert_made(run(*facts, cwd=inputs), 24)
    out = (inputs / "out").rename(inputs / "expected").with_name("out")
    draw, killed = np.random.default_rng(0), 0
    for _ in range(5):
        process = begun(inputs, *facts)
        wanted = images_in(out) + int(draw.integers(0, 9))
        deadline = time.monotonic() + 60
        while images_in(out) < wanted and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3 and len(list((out / "lr").glob("*.png"))) > 3
    assert_made(run(*facts, cwd=inputs), 24)
    assert files_of(out) == files_of(inputs / "expected")


def test_what_a_killed_run_has_made_is_not_made_again(inputs, checkpoint):
    facts = flags(checkpoint, *many_photos(inputs))
    process = begun(inputs, *facts)
    table = inputs / "out" / "pairs.0.jsonl"
    assert waited_for(lambda: table.is_file() and table.read_text().count('"lr"') >= 4)
    process.kill()
    process.join()
    noted = [json.loads(line) for line in table.read_text().split("\n")[:-1] if line]
    times = times_of(inputs / "out")
    assert_made(run(*facts, cwd=inputs), 24)
    after = times_of(inputs / "out")
    assert len(noted) >= 3
    assert all(after[row[side]] == times[row[side]] for row in noted for side in SIDES)


def test_a_second_run_at_the_same_time_is_refused_and_harms_nothing(inputs, checkpoint):
    facts = flags(checkpoint, *many_photos(inputs))
    assert_made(run(*facts, "--out", "expected", cwd=inputs), 24)
    process = begun(inputs, *facts)
    assert process.pid is not None
    assert waited_for(lambda: list(inputs.glob("out/lr/*.png")))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = files_of(inputs / "out")
        for more in ((), ("--seed", 1)):
            done = run(*facts, *more, cwd=inputs)
            assert_refused(done, "--out out: another run is writing there")
            assert done.stderr.count("\n") == 1
        assert files_of(inputs / "out") == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert files_of(inputs / "out") == files_of(inputs / "expected")


def test_a_run_that_came_first_between_the_look_and_the_first_pair_is_not_overwritten(
    inputs, checkpoint, monkeypatch
):
    """Two runs that begin at once find no folder, both; the first that has a pair has it."""
    original = generate.Maker.make

    def late(maker, jobs):
        if not (inputs / "out").exists():
            (inputs / "out").mkdir()
            begun_here.append(held_lock(inputs / "out" / ".lock"))
        return original(maker, jobs)

    begun_here: list[subprocess.Popen] = []
    monkeypatch.setattr(generate.Maker, "make", late)
    assert_refused(run(*flags(checkpoint), cwd=inputs), "another run is writing there")
    assert not list((inputs / "out").rglob("*.png"))
    begun_here[0].kill()
    begun_here[0].wait()


def held_lock(path: Path) -> subprocess.Popen:
    """Another process that holds the lock of a run."""
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def peak_of(cwd: Path, *args: str) -> None:
    """A run that leaves the most memory it took, in bytes, in the file `peak`."""
    torch.set_num_threads(1)
    done = run(*args, cwd=cwd)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (cwd / "peak").write_text(str(peak))
    sys.exit(done.returncode)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photos(inputs, checkpoint):
    peaks, context = [], multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["generate"])
    for count in (300, 3000):
        more = many_photos(inputs, count)
        args = [str(flag) for flag in flags(checkpoint, *more, "--out", f"out{count}")]
        process = context.Process(target=peak_of, args=(inputs, *args))
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks.append(int((inputs / "peak").read_text()))
    assert peaks[1] - peaks[0] < 60 * 2**20


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_gpu_is_asked_for_no_more_launches_by_a_batch_and_never_waited_for():
    counts = []
    for B in (1, 16):
        with fake_cuda() as launches, torch.no_grad():
            with torch.device("cuda:0"):
                nets = extractors.Extractors(STAGE_1)
                net = diffusion.DecoupledDDPM(nets, STAGE_1, STAGE_2)
                hr = torch.zeros(B, 3, 512, 512)
                codes = [torch.zeros(STAGE_1.deg_dim) for _ in range(B)]
            before = launches.total()
            sampler = generate.Sampler(t_start=20, num_steps=3, candidates=2)
            lr, scores = generate.generate(net, hr, codes, sampler, range(B))
            counts.append(launches.total() - before)
            assert lr.shape == (B, 2, 3, 128, 128)
            assert {x.device.type for x in (lr, *scores.values())} == {"cuda"}
    assert max(counts) <= min(counts) + 2 and max(counts) < 1500

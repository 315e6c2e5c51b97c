"""generate.py: the method on a tiny network; the command on a folder of small photos."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

import additions
import degrade
import diffusion
import extractors
import generate
from common import UserError, runtime, tiles
from common.checkpoint import load_checkpoint
from common.images import load_image, resized, save_image, to_uint8
from common.runtime import Runtime, make_generator
from generate import Sampler
from tests.commands import (
    FORKSERVER,
    assert_refused,
    files_of,
    rows_of,
    run,
    run_two,
    start,
    times_of,
)
from tests.drawn import noise_in_bands
from tests.fake_cuda import fake_cuda
from tests.tiny import CONFIG, CPU, STAGE_1, STAGE_2, built, save_net, uniform, untrained

CALIBRATION = additions.Calibration((1.07, 1.02, 0.94, 0.79, 0.62), faint=3.0, uncompressed=88)
# LR is the output of Rec_lr
PLAIN = Sampler(t_start=0, grain=False)


def save_waves(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Write a smooth image; its pixels (H, W, 3) in uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(y / (4 + c + seed) + x / (7 + 2 * c)) for c in range(3)]
    pixels = (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture(scope="module")
def net():
    """A tiny untrained model."""
    net = built()
    net.calibration = CALIBRATION
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    config = CONFIG | {"calibration": asdict(CALIBRATION)}
    return save_net(tmp_path_factory.mktemp("weights") / "last.pt", net, config)


# ---- the method -------------------------------------------------------------------------------


def test_any_size_gives_a_quarter_of_it(net):
    hr, lr_ref = uniform(1, 3, 36, 52), [uniform(3, 17, 20)]
    lr, scores = generate.generate(net, hr, lr_ref, Sampler(num_steps=2, candidates=3), [0])
    assert lr.shape == (1, 3, 3, 9, 13) and 0 <= lr.min() and lr.max() <= 1
    assert scores["content"].shape == scores["degradation"].shape == (1, 3)
    for scored in (False, True):  # of one candidate
        _, scores = generate.generate(net, hr, lr_ref, Sampler(), [0], scored)
        assert set(scores) == {"kept"} | ({"content", "degradation"} if scored else set())


@pytest.mark.parametrize("start", generate.STARTS)
def test_without_noise_steps_lr_is_the_start_image_lr_hat_or_d_of_hr(net, start):
    hr, lr_ref = uniform(1, 3, 64, 64), uniform(3, 16, 16)
    lr, _ = generate.generate(net, hr, [lr_ref], replace(PLAIN, start=start), [3])
    if start == "reconstruct":
        expected = diffusion.content_and_lr_hat(net, hr, net.extractors.e_deg(lr_ref[None]))[1]
    else:
        theta = degrade.sample_degradation(1, start, generator=make_generator(3))
        expected = degrade.degrade(hr, theta)
    torch.testing.assert_close(lr[0], expected, atol=1e-6, rtol=0)


def test_t_is_fixed_behind_rec_lr_and_drawn_for_each_image_behind_d(net, monkeypatch):
    """The paper draws T from 0 to T. All candidates of an image have the same."""
    chains: list[list[int]] = []
    monkeypatch.setattr(diffusion, "sample", lambda eps, x, c, t, *_: chains.append(t) or x)
    hr, lr_ref = uniform(1, 3, 32, 32).expand(24, -1, -1, -1), [uniform(3, 16, 16)] * 24
    generate.generate(net, hr, lr_ref, Sampler(t_start=7, candidates=2), range(24))
    assert chains == [[7, 7]] * 24
    chains.clear()
    paper = replace(generate.Config(**generate.PRESETS["paper"]), candidates=2)
    generate.generate(net, hr, lr_ref, paper, range(24))
    t = [first for first, second in chains if first == second]
    assert len(t) == 24 and len(set(t)) > 12 and 0 <= min(t) < 75 and 225 < max(t) <= 300


def test_reference_image_start_and_seed_matter(net):
    hr, lr_ref = uniform(1, 3, 32, 32), uniform(3, 16, 16)
    sampler = Sampler(t_start=20, num_steps=2, candidates=2)
    lr = generate.generate(net, hr, [lr_ref], sampler, [5])[0]
    assert not torch.equal(lr[:, 0], lr[:, 1])  # candidates differ
    for other, _ in (
        generate.generate(net, hr, [1 - lr_ref / 2], sampler, [5]),
        generate.generate(net, 1 - hr, [lr_ref], sampler, [5]),
        generate.generate(net, hr, [lr_ref], sampler, [6]),
        generate.generate(net, hr, [lr_ref], replace(sampler, start="realesrgan"), [5]),
    ):
        assert (lr - other).abs().max() > 1e-3


@pytest.mark.parametrize("start", generate.STARTS)
def test_an_image_does_not_depend_on_the_others_of_a_batch(net, start):
    hr, lr_ref = uniform(3, 3, 40, 48), [uniform(3, 16, 20, seed=i) for i in range(3)]
    sampler = Sampler(start, t_start=20, num_steps=2, candidates=2)
    lr, scores = generate.generate(net, hr, lr_ref, sampler, (4, 5, 6))
    one, one_s = generate.generate(net, hr[1:2], lr_ref[1:2], sampler, [5])
    assert torch.equal(one[0], lr[1])
    assert all(torch.equal(one_s[key][0], scores[key][1]) for key in scores)


def test_of_a_large_reference_whole_blocks_of_jpeg_are_read(net):
    """F_deg is that of a crop that begins at a multiple of 8 pixels."""
    for height, width, top, left in ((1080, 776, 280, 128), (520, 513, 0, 0), (3000, 90, 1240, 0)):
        lr_ref = uniform(3, height, width)
        crop = lr_ref[:, top : top + 512, left : left + 512]
        assert torch.equal(generate.degradation_of(net, lr_ref), generate.degradation_of(net, crop))


def test_weights_as_printed_generate_but_read_no_grain(tmp_path):
    stage_1, stage_2 = (replace(cfg, as_printed=True) for cfg in (STAGE_1, STAGE_2))
    printed = diffusion.DecoupledDDPM(extractors.Extractors(stage_1), stage_1, stage_2)
    config = asdict(stage_2) | {"extractors": asdict(stage_1)}
    path = str(tmp_path / "last.pt")
    torch.save({"ema": printed.state_dict(), "config": config}, path)
    net = generate.load_generator(path, torch.device("cpu"))
    lr, _ = generate.generate(net, uniform(1, 3, 32, 32), [uniform(3, 16, 16)], PLAIN, [0])
    assert lr.shape == (1, 1, 3, 8, 8) and lr.isfinite().all()
    with pytest.raises(UserError, match="--no-grain"):
        generate.with_sampler_of(net, replace(PLAIN, grain=True), path)


# ---- grain ------------------------------------------------------------------------------------


@pytest.fixture
def head(net, monkeypatch):
    """Set the (noise in levels of 255, JPEG quality) that the head reads, by F_deg or for all."""

    def set_head(reading: tuple, known: Tensor | None = None, reading_of_known: tuple = ()) -> None:
        def effects(degradation: Tensor) -> additions.Effects:
            is_known = [known is not None and torch.allclose(d, known, atol=1e-6)
                        for d in degradation]  # fmt: skip
            noise, quality = torch.tensor([reading_of_known if k else reading for k in is_known]).T
            transfer = original(degradation).transfer
            return additions.Effects(transfer, noise[:, None].repeat(1, 3) / 255, quality.long())

        monkeypatch.setattr(net.extractors, "effects", effects)

    original = net.extractors.effects
    return set_head


@pytest.mark.parametrize(
    ("wanted", "found", "added"), [(10, 0, 10), (5, 3, 4), (5, 6, 0), (3, 0, 0)]
)
def test_grain_adds_the_noise_that_a_candidate_lacks(net, head, wanted, found, added):
    hr, lr_ref = uniform(1, 3, 256, 256) / 2 + 0.25, [uniform(3, 40, 40)]
    head((found, 100), generate.degradation_of(net, lr_ref[0]), (wanted, 100))
    plain = generate.generate(net, hr, lr_ref, PLAIN, [0])[0][0]
    lr = generate.generate(net, hr, lr_ref, replace(PLAIN, candidates=2, grain=True), [0])[0][0]
    inside = (plain > 0.2) & (plain < 0.8)  # where nothing is clipped
    for candidate in lr:
        std = (255 * (candidate - plain)[inside]).std().item()
        assert std == pytest.approx(added, rel=0.05, abs=1e-3)
    assert torch.equal(lr[0], lr[1]) == (added == 0)  # each candidate has its own noise


def test_lr_hat_is_softened_by_the_amplitudes_of_the_weights(net, monkeypatch):
    """In the spectrum of noise, which has all frequencies."""
    lr_hat = 0.5 + 0.08 * torch.randn(1, 3, 128, 128, generator=make_generator(0))
    monkeypatch.setattr(net.extractors, "reconstruct", lambda *_: lr_hat)
    monkeypatch.setattr(net.extractors, "content", lambda hr, *_: hr[..., ::4, ::4])  # not read
    hr, lr_ref = uniform(1, 3, 512, 512), [uniform(3, 40, 40)]
    made = []
    for calibration in (CALIBRATION, additions.Calibration()):
        monkeypatch.setattr(net, "calibration", calibration)
        made.append(generate.generate(net, hr, lr_ref, PLAIN, [0])[0][0])
    soft, plain = made
    assert torch.equal(plain, lr_hat)
    in_training = diffusion.content_and_lr_hat(net, hr, torch.zeros(1, 16))[1]
    assert torch.equal(in_training, plain)
    torch.testing.assert_close(soft.mean(), lr_hat.mean(), atol=1e-4, rtol=0)
    power = [torch.fft.rfft2(x - x.mean()).abs().square().sum((0, 1)) for x in (soft, plain)]
    radius = (torch.fft.fftfreq(128)[:, None] ** 2 + torch.fft.rfftfreq(128) ** 2).sqrt()
    for frequency, amplitude in zip(additions.FREQUENCIES, CALIBRATION.soften, strict=True):
        ring = (radius - frequency).abs() < 0.01
        found = (power[0][ring].sum() / power[1][ring].sum()).sqrt().item()
        assert found == pytest.approx(amplitude, abs=0.05)


def test_weights_without_a_calibration_are_not_softened_and_a_sentence_says_so(
    net, tmp_path, capsys
):
    torch.save({"ema": net.state_dict(), "config": CONFIG}, tmp_path / "last.pt")
    path = str(tmp_path / "last.pt")
    bare = generate.load_generator(path, torch.device("cpu"))
    generate.with_sampler_of(bare, generate.Sampler(), path)
    assert bare.calibration == additions.Calibration()
    printed = capsys.readouterr().out
    assert "not calibrated" in printed and "tools.calibrate" in printed


def test_noise_by_detail_grows_with_the_root_of_detail_and_channels_share_it_in_part():
    """On stripes of 2 pixels the std is known in closed form; flat surfaces stay as they are."""
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(64)  # 1.2 from the mean of 5 pixels
    amplitude = torch.tensor([0.0, 4.0, 16.0]) / 255
    x = (0.5 + amplitude[:, None, None, None] * stripes).expand(3, 3, 256, 256)
    noise = additions.noise_by_detail(x, make_generator(0)) - x
    assert 255 * noise[0].abs().max() < 0.05
    for i, levels in ((1, 4.0), (2, 16.0)):
        std = 1.1 * math.sqrt(1.2 * levels)
        assert 255 * noise[i].std((1, 2)) == pytest.approx(std * np.ones(3), rel=0.03)
        assert torch.corrcoef(noise[i].flatten(1))[0, 1].item() == pytest.approx(0.7, abs=0.02)
    same = additions.noise_by_detail(x[1:2, ..., :1, :1], make_generator(0))  # one pixel
    assert torch.equal(same, x[1:2, ..., :1, :1])


def test_grain_ends_with_the_compression_that_the_head_reads(net, head):
    hr, lr_ref = uniform(1, 3, 128, 128), [uniform(3, 40, 40)]
    sampler = Sampler(t_start=20, num_steps=2, candidates=2)
    plain = generate.generate(net, hr, lr_ref, replace(sampler, grain=False), [0])[0][0]
    for quality in (40, 100):
        head((0, quality))
        lr = generate.generate(net, hr, lr_ref, sampler, [0])[0][0]
        compressed = degrade.jpeg(plain, torch.tensor([40, 40]))
        assert torch.equal(lr, compressed if quality == 40 else plain)


def test_noise_that_compression_looks_like_is_not_added(net, head):
    """The missing noise is measured in the candidate after compression, not before."""
    hr, lr_ref = uniform(1, 3, 128, 128), [uniform(3, 40, 40)]
    plain = generate.generate(net, hr, lr_ref, PLAIN, [0])[0][0]
    head((8, 50), net.extractors.e_deg(plain), (0, 50))
    lr = generate.generate(net, hr, lr_ref, replace(PLAIN, grain=True), [0])[0][0]
    assert torch.equal(lr, degrade.jpeg(plain, torch.tensor([50])))


def test_coloured_noise_has_its_std_in_each_band():
    std = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.5, 2.0], [2.0, 1.6, 1.1]])
    noise = additions.coloured(torch.randn(3, 3, 160, 192, generator=make_generator(0)), std)
    torch.testing.assert_close(noise_in_bands(noise), std, atol=0, rtol=0.1)


# ---- tiles ------------------------------------------------------------------------------------


def test_a_tiled_image_has_no_seams(net, monkeypatch):
    hr, lr_ref = uniform(1, 3, 28, 20), [uniform(3, 16, 16)]
    hr = resized(hr, 4 * 56, 4 * 40).clamp(0, 1)
    whole = generate.generate(
        net, hr, lr_ref, replace(PLAIN, t_start=20, num_steps=3, grain=True), [0]
    )[0][0, 0]
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 8)
    tiled = generate.generate(
        net, hr, lr_ref, replace(PLAIN, t_start=20, num_steps=3, grain=True), [0]
    )[0][0, 0]
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    steps = (tiled - whole).diff(dim=2).abs().mean((0, 1))  # (w - 1,)
    border = torch.zeros_like(steps, dtype=torch.bool)
    border[[23, 24, 31, 32]] = True  # where a tile begins or ends
    assert steps[border].mean() < 2 * steps[~border].mean()


# ---- the filter -------------------------------------------------------------------------------


def test_errors_are_zero_only_for_the_same_content_and_degradation(net):
    lr = uniform(1, 3, 9, 12)
    degradation, content = net.extractors.e_deg(lr), net.extractors.content(resized(lr, 36, 48))
    content_error, degradation_error = generate.errors(net, lr, degradation, content)
    assert content_error.shape == degradation_error.shape == (1,)
    assert content_error.max() < 1e-5 and degradation_error.max() < 1e-5
    torch.testing.assert_close(
        generate.errors(net, lr, degradation, content - 1)[0], content_error + 1
    )
    assert generate.errors(net, lr, degradation - 1, content)[1].item() == pytest.approx(16**0.5)


def test_the_filter_keeps_the_good_candidate(net, monkeypatch):
    """The others are noise. The good one is the reduction of hr, and the reference too."""
    planted = uniform(4, 3, 9, 12)
    monkeypatch.setattr(diffusion, "sample", lambda *_: planted)
    hr = resized(planted[2:3], 36, 48).clamp(0, 1)
    sampler = replace(PLAIN, candidates=4)
    lr, scores = generate.generate(net, hr, [planted[2]], sampler, [0])
    assert scores["kept"].tolist() == [2] and torch.equal(lr[0], planted)
    assert torch.equal(generate.chosen(lr, scores), planted[2:3])


def test_the_filter_weighs_both_errors_equally(net, monkeypatch):
    """Relative to their means they are (0.5, 0.8, 1.7) and (1.7, 0.8, 0.5)."""
    errors = torch.tensor([0.5, 0.8, 1.7]), torch.tensor([170.0, 80.0, 50.0])
    monkeypatch.setattr(generate, "errors", lambda *_: errors)
    hr, lr_ref = uniform(1, 3, 32, 32), [uniform(3, 16, 16)]
    _, scores = generate.generate(net, hr, lr_ref, Sampler(candidates=3), [0])
    assert scores["kept"].tolist() == [1]


# ---- references -------------------------------------------------------------------------------


def drawn(names: list[str]) -> list[str]:
    """The references of 4,000 photos; none of these files is read."""
    references = generate.References(list(map(Path, names)), ["data/lr"], None, 1)
    seeds = [make_generator(0, f"photo {i}").initial_seed() for i in range(4000)]
    return [names[references.draw(seed)] for seed in seeds]


def test_references_are_drawn_evenly_and_a_new_one_changes_only_its_own_draws():
    names = [f"data/lr/phone/IMG_{i:04d}.jpg" for i in range(49)]
    before = drawn(names)
    assert stats.chisquare([before.count(name) for name in names]).pvalue > 1e-4
    after = drawn([*names[:20], "data/lr/new.jpg", *names[20:]])
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(changed) == {"data/lr/new.jpg"}
    assert len(changed) == pytest.approx(4000 / 50, abs=36)  # 4 standard deviations


def test_f_deg_of_a_folder_is_averaged_from_the_reference_on(net, tmp_path):
    names = ["a/1.png", "a/2.png", "a/3.png", "a/4.png", "b/1.png"]
    files = [tmp_path / name for name in names]
    for i, file in enumerate(files):
        save_image(file, uniform(3, 32, 32, seed=i))
    files[3].write_text("not an image")

    def mean(r: int, average: int) -> Tensor:
        references = generate.References(files, [str(tmp_path)], net, average)
        references.code(lambda: set(references.averaged(r)), CPU)
        return references.mean_degradation(r)[0]

    first, second, third, _, alone = (
        generate.degradation_of(net, load_image(file))[0] if i != 3 else None
        for i, file in enumerate(files)
    )
    assert torch.allclose(mean(1, 1), second)
    assert torch.allclose(mean(1, 2), (second + third) / 2)
    assert torch.allclose(mean(1, 3), mean(1, 2))  # the fourth can't be read
    assert torch.allclose(mean(1, 99), (first + second + third) / 3)
    assert torch.equal(mean(4, 99), alone)


class Coded:
    """Files of 40 photos of a camera, the last one damaged; which of them were read and coded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = [folder / f"{i:02d}.png" for i in range(40)]
        self.read: list[Path] = []
        self.batches: list[int] = []
        self.monkeypatch = monkeypatch
        for i, file in enumerate(self.files):
            save_image(file, uniform(3, 16, 16, seed=i))
        self.files[-1].write_text("not an image")
        load, degradation_of = generate.load_pixels, generate.degradation_of
        monkeypatch.setattr(generate, "load_pixels", lambda f: self.read.append(f) or load(f))
        monkeypatch.setattr(
            generate, "degradation_of",
            lambda net, lr: self.batches.append(len(lr)) or degradation_of(net, lr),
        )  # fmt: skip

    def references(self, net: object, rt: Runtime, needed: range) -> generate.References:
        references = generate.References(self.files, ["camera"], net, average=8)
        references.code(lambda: set(needed), rt)
        references.code(lambda: set(needed) - {39}, rt)  # nothing new
        return references


def test_processes_share_the_references_that_are_needed(net, tmp_path, monkeypatch):
    alone = Coded(tmp_path, monkeypatch).references(net, CPU, range(40))
    coded = Coded(tmp_path, monkeypatch)
    values, barrier = [None, None], threading.Barrier(2, timeout=60)

    def of_all(value: object, rt: Runtime) -> list:
        values[rt.rank] = value
        barrier.wait()
        both = list(values)
        barrier.wait()
        return both

    monkeypatch.setattr(generate, "of_all", of_all)
    needed = [range(30), range(20, 40)]
    with ThreadPoolExecutor(2) as pool:
        runtimes = [Runtime(torch.device("cpu"), rank, 2) for rank in range(2)]
        both = list(pool.map(coded.references, [net] * 2, runtimes, needed))
    assert sorted(coded.read) == coded.files  # each once
    for references in both:
        assert references.degradations.keys() == set(range(39))
        assert not references.usable[39] and references.usable[:39].all()
        for r in range(39):
            assert torch.equal(references.degradations[r], alone.degradations[r])


def test_each_core_codes_another_reference(net, tmp_path, monkeypatch):
    coded, barrier = Coded(tmp_path, monkeypatch), threading.Barrier(2, timeout=60)
    inner = generate.degradation_of

    def together(net: object, lr: Tensor) -> Tensor:
        barrier.wait()
        return inner(net, lr)

    monkeypatch.setattr(generate, "degradation_of", together)
    torch.set_num_threads(2)
    try:
        coded.references(net, CPU, range(20))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert coded.batches == [1] * 20


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_gpu_codes_references_in_batches_and_is_waited_for_once_for_each(tmp_path, monkeypatch):
    coded = Coded(tmp_path, monkeypatch)
    monkeypatch.setattr(runtime, "BATCH", 16 * 16**2)
    with fake_cuda() as launches, torch.no_grad():
        with torch.device("cuda:0"):
            net = untrained()
        rt = Runtime(torch.device("cuda:0"))
        references = coded.references(net, rt, range(39))
    assert coded.batches == [16, 16, 7]
    assert launches.waits == {"cuda (16, 16)": 2, "cuda (7, 16)": 1}
    assert references.degradations.keys() == set(range(39))


# ---- the plan of a run ------------------------------------------------------------------------


def test_the_seed_of_a_pair_depends_on_its_name_alone():
    def planned(photos: str) -> dict[str, int]:
        files = [Path(f"hr/{name}.png") for name in photos]
        jobs = generate.pairs_to_make(generate.Config(hr=("hr",)), files)
        assert [job.file for job in jobs] == files
        return {job.name: job.seed for job in jobs}

    seeds, more = planned("abc"), planned("zabcde")
    assert seeds.items() <= more.items() and len(set(more.values())) == len(more) == 6


# ---- the command line -------------------------------------------------------------------------

SIDES = ("hr", "lr")


def command(checkpoint: Path, *more: object) -> list:
    """A command for a run inside the folder: a copy of the folder gets the same records."""
    text = "generate.py --hr hr --lr-ref refs --out out --device cpu"
    method = "--t-start 20 --num-steps 2 --candidates 4"
    return [*text.split(), *method.split(), "--checkpoint", checkpoint, *more]


def waited_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not (fulfilled := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.005)
    return fulfilled


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def assert_made(done: subprocess.CompletedProcess, count: int, skipped: int = 0) -> None:
    """The run ended well and printed these numbers."""
    assert done.returncode == 0, done.stderr
    assert f"{count} pairs in " in done.stdout, done.stdout
    assert f"{skipped} images skipped" in done.stdout, done.stdout


def assert_agrees(out: Path) -> None:
    """The images, pairs.jsonl and both lists name the same pairs; there are no other files."""
    rows = [row for row in rows_of(out) if not row["dropped"]]
    names = [row["lr"].removeprefix("lr/") for row in rows]
    for side in SIDES:
        assert sorted(p.name for p in (out / side).iterdir()) == sorted(names)
        assert [row[side] for row in rows] == [f"{side}/{name}" for name in names]
    sizes = [Image.open(out / "hr" / name).size for name in names]
    listed = [f"{name} ({h},{w},3)" for name, (w, h) in zip(names, sizes, strict=True)]
    assert (out / "meta_info.txt").read_text().splitlines() == listed  # BasicSR's form
    lines = (out / "meta_info_realesrgan.txt").read_text().splitlines()
    assert lines == [f"hr/{name}, lr/{name}" for name in names]
    others = {"hr", "lr", "pairs.jsonl", "meta_info.txt", "meta_info_realesrgan.txt", ".realdgen"}
    assert {p.name for p in out.iterdir()} - {"removed"} == others | {"preview.png"}


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A folder with photos and the pairs of a first run, and that run. b.png has 16 bits."""
    folder = tmp_path_factory.mktemp("finished")
    for name, height, width in (("a", 37, 50), ("b", 64, 48), ("c", 64, 48), ("d", 64, 48)):
        pixels = save_waves(folder / "hr" / f"{name}.png", height, width)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200 + 77)
    deep.save(folder / "hr" / "b.png")
    for i in range(2):
        save_waves(folder / "refs" / f"r{i}.jpg", 20, 24, 5 * i)
    return folder, run(*command(checkpoint), cwd=folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished folder that a test may change."""
    return shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)


@pytest.fixture
def inputs(copied):
    """The same without pairs."""
    shutil.rmtree(copied / "out")
    return copied


def test_a_folder_becomes_aligned_recorded_pairs_as_the_method_makes_them(finished, net):
    folder, done = finished
    out = folder / "out"
    assert_made(done, 4)
    assert "out/preview.png" in done.stdout
    assert_agrees(out)
    Image.open(out / "preview.png").load()
    records = rows_of(out)
    assert [record["lr"] for record in records] == [f"lr/{name}.png" for name in "abcd"]
    sampler = Sampler(t_start=20, num_steps=2, candidates=4)
    for record in records:
        assert (record["seed"], record["t_start"], record["start"]) == (0, 20, "reconstruct")
        assert len(record["content_errors"]) == len(record["degradation_errors"]) == 4
        source = load_image(folder / record["source"])
        hr, lr = (load_image(out / record[side]) for side in SIDES)
        H, W = (side // 4 * 4 for side in source.shape[1:])
        assert torch.equal(to_uint8(hr), to_uint8(source[:, :H, :W]))
        seed = make_generator(0, Path(record["lr"]).stem).initial_seed()
        files = [record["lr_ref"], *record["averaged"]]
        assert {Path(file).name for file in files} == {"r0.jpg", "r1.jpg"}
        each = [generate.degradation_of(net, load_image(folder / file)) for file in files]
        mean = torch.cat(each).mean(0)
        made = generate.chosen(*generate.generate(net, hr[None], [mean], sampler, [seed]))[0]
        assert torch.equal(to_uint8(made), to_uint8(lr))


def test_a_second_run_changes_no_byte_and_brings_back_what_is_missing(copied, checkpoint):
    out = copied / "out"
    before, times = files_of(out), times_of(out)
    assert_made(run(*command(checkpoint), cwd=copied), 4)
    assert times_of(out).items() >= times.items()
    for name in ("lr/c.png", "hr/a.png", "preview.png", "meta_info.txt", "pairs.jsonl"):
        if name == "pairs.jsonl":  # images without it would be of no known pair
            shutil.rmtree(out / "hr")
            shutil.rmtree(out / "lr")
        (out / name).unlink()
        assert_made(run(*command(checkpoint), cwd=copied), 4)
        assert files_of(out) == before


def test_other_settings_or_weights_need_another_folder(copied, checkpoint):
    before = files_of(copied / "out")
    state = load_checkpoint(checkpoint)
    state["ema"] = {key: value + 0.01 for key, value in state["ema"].items()}
    torch.save(state, copied / "other.pt")
    for more, word in (
        (("--checkpoint", "other.pt"), "weights"),
        (("--seed", 1, "--average", 2), "average, seed"),
        (("--average", 1), "average"),
        (("--max-error", 1, 1), "max_error"),
        (("--t-start", 21, "--eta", 0), "t_start, eta"),
    ):
        assert_refused(run(*command(checkpoint, *more), cwd=copied), f"({word})", "--out")
        assert files_of(copied / "out") == before


def test_images_that_are_unreadable_or_not_finite_are_skipped_and_counted(
    inputs, checkpoint, monkeypatch
):
    (inputs / "hr" / "b.png").write_text("This is not an image.")
    save_waves(inputs / "hr" / "e.png", 20, 64)
    (inputs / "refs" / "r1.jpg").write_bytes(b"")
    save_waves(inputs / "refs" / "r2.png", 8, 8)
    original = generate.generate

    def spoiled(net, hr, *more):
        lr, scores = original(net, hr, *more)
        return (lr / 0 if hr.shape[2] == 36 else lr), scores  # the height of a.png

    monkeypatch.setattr(generate, "generate", spoiled)
    done = run(*command(checkpoint), cwd=inputs)
    assert_made(done, 2, skipped=3)
    assert_agrees(inputs / "out")
    assert {p.name for p in (inputs / "out" / "lr").iterdir()} == {"c.png", "d.png"}
    assert all(f"{name}.png" in done.stdout for name in "abe") and "not finite" in done.stdout
    assert all(done.stdout.count(f"skipped: refs/{name}") == 1 for name in ("r1.jpg", "r2.png"))
    assert {row["lr_ref"] for row in rows_of(inputs / "out")} == {"refs/r0.jpg"}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--start foo", "--start"), ("--t-start 501", "--t-start"), ("--candidates 0", "--cand"),
        ("--max-error 1", "--max-error"),
        ("--lr-ref empty", "--lr-ref"),
        ("--lr-ref bad.png", "--lr-ref"), ("--hr bad.png", "none of the HR images"),
        ("--checkpoint missing.pt", "missing.pt"), ("--checkpoint stage_1.pt", "stage_1.pt"),
    ],
)  # fmt: skip
def test_senseless_input_is_refused_and_nothing_written(inputs, checkpoint, flags, word):
    (inputs / "empty").mkdir()
    (inputs / "bad.png").write_text("This is not an image.")
    torch.save({"ema": {}, "config": asdict(STAGE_1)}, inputs / "stage_1.pt")
    before = files_of(inputs)
    assert_refused(run(*command(checkpoint, *flags.split()), cwd=inputs), word)
    assert files_of(inputs) == before and not (inputs / "out").exists()


def test_missing_weights_name_the_command_that_makes_them(inputs, monkeypatch):
    monkeypatch.setattr("common.checkpoint.DATA", inputs / "data")  # no data/pretrained there
    done = run(*"generate.py --hr hr --lr-ref refs --out out".split(), cwd=inputs)
    assert_refused(done, "python diffusion.py")
    assert not (inputs / "out").exists()


def test_too_little_memory_of_a_gpu_changes_no_pair(inputs, checkpoint, monkeypatch):
    args = command(checkpoint, *more_photos(inputs, 5))
    assert_made(run(*args, cwd=inputs), 9)
    original, batches = generate.generate, []

    def in_small_memory(net: object, hr: Tensor, *more: object) -> tuple:
        if len(hr) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        batches.append(len(hr))
        return original(net, hr, *more)

    def as_on_a_gpu(load: Callable, work: Callable, items: list, device: object) -> Iterator:
        return runtime.in_batches(load, work, items, torch.device("cuda:0"))

    monkeypatch.setattr(generate, "generate", in_small_memory)
    monkeypatch.setattr(generate, "in_batches", as_on_a_gpu)
    assert_made(run(*args, "--out", "small", cwd=inputs), 9)
    assert 2 in batches
    assert files_of(inputs / "small") == files_of(inputs / "out")


def test_poor_pairs_are_dropped_counted_and_not_made_again(inputs, finished, checkpoint):
    errors = sorted(row["content_errors"][row["kept"]] for row in rows_of(finished[0] / "out"))
    more = ("--max-error", (errors[1] + errors[2]) / 2, 1e9)
    for _ in range(2):
        done = run(*command(checkpoint, *more), cwd=inputs)
        assert_made(done, 2)
        assert "2 dropped" in done.stdout and len(rows_of(inputs / "out")) == 4
        assert_agrees(inputs / "out")
    more = ("--max-error", 0, 0, "--candidates", 1, "--out", "none")  # no pair is good enough
    done = run(*command(checkpoint, *more), cwd=inputs)
    assert_made(done, 0)
    assert "4 dropped" in done.stdout and "look at" not in done.stdout
    assert not list((inputs / "none").rglob("*.png"))


# ---- the folder holds the pairs of the last command ---------------------------------------------


def test_photos_that_come_and_go_cost_only_themselves(copied, checkpoint):
    """One is added before all others, one is moved to a folder, one removed, one replaced."""
    out = copied / "out"
    before, times = files_of(out), times_of(out)
    save_waves(copied / "hr" / "Aa.png", 64, 48, 3)
    (copied / "hr" / "moved").mkdir()
    (copied / "hr" / "b.png").rename(copied / "hr" / "moved" / "b.png")
    (copied / "hr" / "c.png").unlink()
    replaced = save_waves(copied / "hr" / "d.png", 64, 48, 8)
    done = run(*command(checkpoint), cwd=copied)
    assert_made(done, 4)
    assert "2 pairs" in done.stdout and str(Path("out/removed")) in done.stdout
    assert_agrees(out)
    assert {p.stem for p in (out / "lr").iterdir()} == {"Aa", "a", "d", "moved_b"}
    assert all(times_of(out)[f"{side}/a.png"] == times[f"{side}/a.png"] for side in SIDES)
    np.testing.assert_array_equal(pixels_of(out / "hr" / "d.png"), replaced)
    removed = {
        f"{side}/{name}.png": before[f"{side}/{name}.png"] for name in "bc" for side in SIDES
    }
    assert files_of(out / "removed") == removed
    # A run into a new folder makes the same.
    assert_made(run(*command(checkpoint), "--out", "new", cwd=copied), 4)
    shutil.rmtree(out / "removed")
    assert files_of(out) == files_of(copied / "new")


def test_the_same_names_in_another_folder_are_other_photos(inputs, checkpoint):
    out, args = inputs / "out", command(checkpoint, "--candidates", 1)
    assert_made(run(*args, cwd=inputs), 4)
    shutil.copytree(inputs / "hr", inputs / "other")
    pixels = save_waves(inputs / "other" / "c.png", 64, 48, 9)
    os.utime(inputs / "other" / "c.png", (0, 0))  # older than the pairs
    assert_made(run(*args, "--hr", "other", cwd=inputs), 4)
    np.testing.assert_array_equal(pixels_of(out / "hr" / "c.png"), pixels)
    assert not (out / "removed").exists()


def test_a_reference_that_is_added_costs_only_the_pairs_whose_f_deg_it_joins(inputs, checkpoint):
    args = command(checkpoint, *more_photos(inputs, 6), "--average", 2)
    assert_made(run(*args, cwd=inputs), 10)
    before, times = rows_of(inputs / "out"), times_of(inputs / "out")
    save_waves(inputs / "refs" / "a.jpg", 20, 24, 7)
    assert_made(run(*args, cwd=inputs), 10)
    after, now = rows_of(inputs / "out"), times_of(inputs / "out")
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    joined = [row for row in after if "refs/a.jpg" in (row["lr_ref"], *row["averaged"])]
    assert changed == joined and {row["lr_ref"] for row in changed} == {"refs/a.jpg", "refs/r1.jpg"}
    assert 0 < len(changed) < 10
    assert {row["lr"] for row in after if now[row["lr"]] != times[row["lr"]]} == {
        row["lr"] for row in changed
    }


def test_results_inside_the_folder_of_photos_are_not_read_as_photos(inputs, checkpoint):
    for _ in range(2):
        assert_made(run(*command(checkpoint), "--out", "hr/pairs", cwd=inputs), 4)
        assert_agrees(inputs / "hr" / "pairs")
    done = run(*command(checkpoint), "--out", "hr/pairs", "--hr", "hr/pairs/hr", cwd=inputs)
    assert_refused(done, "--out")


def test_names_of_all_kinds_make_files_that_the_readers_of_the_lists_find(inputs, checkpoint):
    """BasicSR, neosr, traiNNer-redux and Real-ESRGAN. No names differ only in their case."""
    names = ("my photo", "one, two", "ünï", "tab\tand  blanks ", "sub dir/x y", "A", "x/b", "x_B")
    for i, name in enumerate(names):
        save_waves(inputs / "hr" / f"{name}.png", 36, 36, i)
    assert_made(run(*command(checkpoint, "--candidates", 1), cwd=inputs), 12)
    out = inputs / "out"
    assert_agrees(out)
    with open(out / "meta_info.txt") as file:  # as basicsr/data/data_util.py
        read = [line.strip().split(" ")[0] for line in file]
    assert len({name.casefold() for name in read}) == 12
    assert all((out / side / name).is_file() for name in read for side in SIDES)
    with open(out / "meta_info_realesrgan.txt") as file:  # as realesrgan_paired_dataset.py
        paths = [line.strip().split(", ") for line in file]
    assert len(paths) == 12 and all((out / file).is_file() for pair in paths for file in pair)
    for row in rows_of(out):  # each is made of its own photo
        hr = load_image(out / row["hr"])
        source = load_image(inputs / row["source"])[:, : hr.shape[1], : hr.shape[2]]
        assert torch.equal(to_uint8(hr), to_uint8(source))


# ---- several processes, kill -9 -----------------------------------------------------------------


def test_neither_processes_nor_threads_change_a_byte(inputs, finished, checkpoint):
    expected = files_of(finished[0] / "out")
    first, second = run_two(*command(checkpoint), cwd=inputs)
    assert_made(first, 4)
    assert second.returncode == 0 and files_of(inputs / "out") == expected
    shutil.rmtree(inputs / "out")
    torch.set_num_threads(2)
    try:
        assert_made(run(*command(checkpoint), cwd=inputs), 4)
    finally:
        torch.set_num_threads(1)
    assert files_of(inputs / "out") == expected


def test_a_killed_run_is_completed(copied, checkpoint):
    """Its process left a table of its own that ends within a line, an old list and preview."""
    out, before = copied / "out", files_of(copied / "out")
    lines = (out / "pairs.jsonl").read_text().splitlines(keepends=True)
    (out / "pairs.jsonl").write_text("".join(lines[:2]))
    (out / "pairs.0.jsonl").write_text(lines[2] + lines[3][:-40])
    with open(out / ".realdgen", "a") as record:
        record.write("pairs.0.jsonl\n")
    (out / "meta_info.txt").write_text("old\n")
    (out / "preview.png").write_text("old")
    assert_made(run(*command(checkpoint), cwd=copied), 4)
    assert files_of(out) == before


def more_photos(folder: Path, count: int) -> list[object]:
    """Add photos; returns flags for a quick run."""
    for i in range(count):
        save_waves(folder / "hr" / f"e{i:04d}.png", 64, 64, i)
    return ["--candidates", 1]


def images_in(folder: Path) -> int:
    return len(list(folder.rglob("[!.]*.png")))


def test_kill_9_at_any_moment_and_then_the_same_command_lose_nothing(inputs, checkpoint):
    """The folder equals an uninterrupted run's byte for byte; noted pairs are not made again."""
    args = command(checkpoint, *more_photos(inputs, 12))
    assert_made(run(*args, "--out", "expected", cwd=inputs), 16)
    out, noted = inputs / "out", dict[str, int]()  # times of the files of noted pairs
    draw, killed = np.random.default_rng(0), 0
    for _ in range(3):
        process, wanted = start(*args, cwd=inputs), images_in(out)
        wanted += int(draw.integers(2, 7))
        waited_for(lambda p=process, n=wanted: images_in(out) >= n or not p.is_alive())
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        times = times_of(out)
        assert noted.items() <= times.items()
        for line in "".join(t.read_text() for t in out.glob("pairs*.jsonl")).splitlines():
            if line.endswith("}"):  # not torn
                noted |= {json.loads(line)[side]: times[json.loads(line)[side]] for side in SIDES}
    assert killed >= 2 and len(noted) > 2
    assert_made(run(*args, cwd=inputs), 16)
    assert noted.items() <= times_of(out).items()
    assert files_of(out) == files_of(inputs / "expected")


def test_a_second_run_at_the_same_time_is_refused_and_harms_nothing(inputs, checkpoint):
    args = command(checkpoint, *more_photos(inputs, 12))
    process = start(*args, cwd=inputs)
    assert process.pid is not None and waited_for(lambda: list(inputs.glob("out/lr/*.png")))
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = files_of(inputs / "out")
        for more in ((), ("--seed", 1)):
            done = run(*args, *more, cwd=inputs)
            assert_refused(done, "--out out: another command is writing there")
        first, second = run_two(*args, cwd=inputs)  # of two, the first looks at the lock
        assert_refused(first, "another command is writing there")
        assert_refused(second, "another process has stopped")
        assert files_of(inputs / "out") == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert_agrees(inputs / "out")
    assert len(rows_of(inputs / "out")) == 16


# ---- resources ----------------------------------------------------------------------------------


def peak_of(cwd: Path, args: list) -> None:
    """A run that writes the most memory it took, in bytes, to the file `peak`."""
    torch.set_num_threads(1)
    assert run(*args, cwd=cwd).returncode == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (cwd / "peak").write_text(str(peak))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photos(inputs, checkpoint):
    peaks = []
    for count in (300, 3000):
        more = more_photos(inputs, count)
        args = command(checkpoint, *more, "--out", f"out{count}")
        process = FORKSERVER.Process(target=peak_of, args=(inputs, args))
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
                net = untrained()
                hr = torch.zeros(B, 3, 512, 512)
                degradations = [torch.zeros(STAGE_1.deg_dim) for _ in range(B)]
            before = launches.total()
            sampler = Sampler(t_start=20, num_steps=3, candidates=2)
            lr, scores = generate.generate(net, hr, degradations, sampler, range(B))
            counts.append(launches.total() - before)
            assert lr.shape == (B, 2, 3, 128, 128)
            assert {x.device.type for x in (lr, *scores.values())} == {"cuda"}
    assert max(counts) <= min(counts) + 2 and max(counts) < 1500

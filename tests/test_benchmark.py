"""Metrics against closed forms, scikit-image and published values; pairs; the table end to end."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import benchmark
import common
import degrade
import extractors
import generate

ROOT = Path(benchmark.__file__).parent


def two_images(batch=2, height=37, width=50):
    x = torch.rand(batch, 3, height, width, generator=common.generator(1))
    eps = torch.randn(x.shape, generator=common.generator(2))
    return x, (x + 0.1 * eps).clamp(0, 1)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(number, size):
    """A smooth drawn image, uint8 (size, size, 3)."""
    y, x, c = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
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


# ---- metrics ------------------------------------------------------------------------------------


def test_psnr_of_a_constant_difference_is_its_level():
    x = torch.full((2, 3, 8, 8), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(benchmark.psnr(x, y).float(), torch.tensor([20.0, 40.0]))
    assert benchmark.psnr(x, x).isinf().all()


def test_psnr_equals_scikit_image_for_each_image():
    x, y = two_images()
    expected = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1)
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(benchmark.psnr(x, y), expected, atol=1e-5)


@pytest.mark.parametrize("to_y", [False, True])
def test_ssim_equals_scikit_image(to_y):
    x, y = two_images()
    if to_y:
        x, y = benchmark.rgb_to_y(x), benchmark.rgb_to_y(y)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1, **options
        )
        for a, b in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(benchmark.ssim(x, y), expected, atol=1e-5)
    np.testing.assert_allclose(benchmark.ssim(x, x), 1)


def test_luma_of_known_colours():
    colours = {
        (0, 0, 0): 16.0,
        (1, 1, 1): 235.0,
        (1, 0, 0): 16 + 65.481,
        (0, 1, 0): 16 + 128.553,
        (0, 0, 1): 16 + 24.966,
        (0.5, 0.25, 0.75): 16 + 0.5 * 65.481 + 0.25 * 128.553 + 0.75 * 24.966,
    }
    x = torch.tensor(list(colours)).view(-1, 3, 1, 1)
    y = benchmark.rgb_to_y(x)
    assert y.shape == (len(colours), 1, 1, 1)
    torch.testing.assert_close(y.flatten() * 255, torch.tensor(list(colours.values())))


def test_deep_distances_have_their_published_values(shared, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(shared / "weights"))
    common.perceptual_net.cache_clear()

    def load(name):
        return common.load_image(shared / "weights" / "reference" / f"{name}.png")[None]

    reference = load("ex_ref").repeat(2, 1, 1, 1)
    distance = benchmark.lpips_distance(reference, torch.cat([load("ex_p0"), load("ex_p1")]))
    np.testing.assert_allclose(distance, [0.7219, 0.1376], atol=1e-4)
    r0, r1 = load("r0"), load("r1")
    np.testing.assert_allclose(benchmark.dists_distance(r0, r1), [0.3347], atol=1e-4)
    both = benchmark.dists_distance(torch.cat([r0, r0]), torch.cat([r1, r0]))
    np.testing.assert_allclose(both, [0.3347, 0.0], atol=1e-4)


def test_packages_of_the_metrics_load_whatever_torchvisions_operators_do():
    common.import_torchvision()
    import DISTS_pytorch
    import lpips
    import torchvision

    assert lpips.LPIPS and DISTS_pytorch.DISTS and torchvision.models.vgg16


def test_missing_weights_are_named_and_never_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    common.perceptual_net.cache_clear()
    x, y = two_images(height=64, width=64)
    for distance, file in (
        (benchmark.lpips_distance, "alexnet-owt-7be5be79.pth"),
        (benchmark.dists_distance, "vgg16-397923af.pth"),
    ):
        with pytest.raises(common.UserError, match=file):
            distance(x, y)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_sentence(tmp_path, monkeypatch):
    file = tmp_path / "hub" / "checkpoints" / common.WEIGHTS["alex"]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a download")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    common.perceptual_net.cache_clear()
    with pytest.raises(common.UserError, match="no readable weights"):
        benchmark.lpips_distance(*two_images(height=64, width=64))


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
    other = benchmark.other_scenes(cameras, seed)
    assert all(i != j and cameras[i] == cameras[j] for i, j in other.items())
    assert sorted(other) == sorted(other.values()), "each scene is used once"
    assert set(range(len(cameras))) - set(other) == {
        i for i, camera in enumerate(cameras) if cameras.count(camera) == 1
    }
    assert other == benchmark.other_scenes(cameras, seed)


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

    def answer(net, hr, lr_ref, t_start, candidates, start, seeds, **options):
        calls.append({"t_start": t_start, "start": start, "seeds": seeds})
        calls[-1] |= {"candidates": candidates} | options
        size = (hr.shape[2] // 4, hr.shape[3] // 4)
        lr = torch.stack([torch.nn.functional.interpolate(x[None], size)[0] for x in lr_ref])
        candidates = torch.stack([torch.zeros_like(lr)] * (candidates - 1) + [lr], dim=1)
        return candidates, {"kept": torch.full((len(hr),), candidates.shape[1] - 1)}

    monkeypatch.setattr(generate, "load_generator", lambda checkpoint, device: None)
    monkeypatch.setattr(generate, "generate", answer)
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
    table = {"2": "table2.md"}.get(cfg.table[0], f"{cfg.table[0]}.md")
    return results, (tmp_path / "out" / table).read_text()


def test_the_table_has_each_method_and_every_value(tmp_path, monkeypatch, copying_generator):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    results, table = run_table(
        tmp_path, write_pairs(tmp_path / "RealSR"), batch_size=2, start="degrade"
    )
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    counts = {name: row["n"] for name, row in rows.items()}
    assert counts == {
        "bicubic": 5,
        "Real-ESRGAN": 5,
        "BSRGAN": 5,
        "RealDGen T=0, own LR": 5,
        "RealDGen T=0, other scene": 4,
        "RealDGen, own LR": 5,
        "RealDGen, other scene": 4,
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
    # T = 0 is Rec_lr alone, whatever diffusion starts from.
    starts = {call["t_start"]: call["start"] for call in copying_generator}
    assert starts == {0: "reconstruct", 9: "degrade"}
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


def test_sampling_compares_settings_on_the_same_pairs(tmp_path, monkeypatch, copying_generator):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    folder = write_pairs(tmp_path / "RealSR")
    results, text = run_table(tmp_path, folder, table=("sampling",), images=3)
    rows = results["sampling"][0]["rows"]
    assert len(rows) == 11 and all(row["n"] == 3 for row in rows) and results["sets"] == []
    used = {(c["t_start"], c["num_steps"], c["eta"], c["solver"], c["candidates"], c["start"])
            for c in copying_generator}  # fmt: skip
    T, K = 9, 2
    assert {(0, 5, 0.0, "ddim", 1, "reconstruct"), (T, 10, 0.0, "dpm", 1, "reconstruct"),
            (T, T, 1.0, "ddim", 1, "reconstruct"), (T, 5, 0.0, "ddim", 1, "degrade"),
            (T, 5, 0.0, "ddim", K, "reconstruct")} <= used  # fmt: skip
    assert "dpm, 5 evaluations" in text and f"from T={T}" in text


def test_scale_2_reaches_the_generator_at_4_times_the_lr_size(
    tmp_path, monkeypatch, copying_generator
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    results, _ = run_table(tmp_path, write_pairs(tmp_path / "x2", ["a1", "a2"], scale=2))
    rows = {row["method"]: row for row in results["sets"][0]["rows"]}
    assert all(row["n"] == 2 for row in rows.values())
    assert rows["RealDGen T=0, own LR"]["mean"]["PSNR Y"] == 100


@pytest.mark.parametrize("name", ["RealSR", "DRealSR"])
def test_bicubic_row_of_the_shared_pairs_is_reproduced_without_our_code(shared, name):
    folder = shared / "photos/pairs" / name
    expected = []
    for file in sorted((folder / "HR").glob("*.webp")):
        real = Image.open(folder / "LR" / file.name).convert("RGB")
        made = Image.open(file).convert("RGB").resize(real.size, Image.Resampling.BICUBIC)
        a, b = np.asarray(made, np.float64), np.asarray(real, np.float64)
        luma = np.array([65.481, 128.553, 24.966]) / 255
        squares = ((a - b) ** 2).mean(), ((a @ luma - b @ luma) ** 2).mean()
        expected.append([10 * math.log10(255**2 / square) for square in squares])
    pairs = benchmark.find_pairs(folder)[0]
    assert len(expected) == len(pairs) > 40
    metrics = ["PSNR RGB", "PSNR Y"]
    device = torch.device("cpu")
    row = benchmark.evaluate("bicubic", benchmark.bicubic, pairs, metrics, 8, device)
    np.testing.assert_allclose(list(row["mean"].values()), np.mean(expected, axis=0), atol=0.01)


# ---- does generated LR follow its reference? ----------------------------------------------------


def scenes(batch=3, size=192):
    """Drawn photos (B, 3, size, size): shapes with edges at all scales, and a little grain."""
    images = []
    for number in range(batch):
        gen = common.generator(number)
        noise = [torch.randn(3, size, size, generator=gen).numpy() for _ in range(4)]
        shapes = [
            ndimage.gaussian_filter(x, (0, s, s)) > 0
            for x, s in zip(noise, (2, 4, 8, 24), strict=True)
        ]
        image = 0.25 + 0.12 * np.sum(shapes, axis=0) + 0.01 * noise[0]
        images.append(torch.from_numpy(image).float())
    return torch.stack(images).clamp(0, 1)


@pytest.mark.parametrize(
    "factor, least", [("blur", 0.95), ("noise", 0.95), ("sharpen", 0.95), ("jpeg", 0.9)]
)
def test_the_measure_of_a_factor_rises_with_the_factor(factor, least):
    hr = scenes()
    banks = [benchmark.reductions(x) for x in hr]
    found = benchmark.follow(hr, banks, benchmark.truth, factor, seed=0)
    assert len(found["rank"]) == 3 and min(found["rank"]) > least
    np.testing.assert_allclose(found["detail"], 1)


def test_measures_have_the_units_of_the_factors():
    hr = scenes(1)[0]
    bank = benchmark.reductions(hr)
    plain = bank[:1]
    blurred = ndimage.gaussian_filter(hr, (0, 4, 4), mode="mirror", truncate=3)  # 1 LR pixel
    soft = extractors.resized(torch.from_numpy(blurred)[None], 48, 48)
    assert benchmark.blur_of(soft, bank).item() == pytest.approx(1, abs=0.02)
    noise = torch.randn(plain.shape, generator=common.generator(5))
    noisy = plain / 2 + 0.25 + 0.02 * noise  # a change of contrast is no noise
    assert benchmark.noise_of(noisy, bank).item() == pytest.approx(0.02 * 255, rel=0.1)
    one = torch.from_numpy(ndimage.gaussian_filter(plain, (0, 0, 1, 1), mode="mirror"))
    for amount in (-0.5, 0.0, 0.8):
        sharp = plain + amount * (plain - one)
        assert benchmark.sharpening_of(sharp, bank).item() == pytest.approx(amount, abs=0.02)
    steps = torch.arange(48) // 8 / 100
    assert benchmark.blockiness(noise / 100 + steps + steps[:, None]) > 1
    assert benchmark.blockiness(noise).item() == pytest.approx(1, abs=0.1)


def drawn_folder(folder, batch=3):
    for number, image in enumerate(scenes(batch)):
        common.save_image(folder / f"{number}.png", image)
    return folder


@pytest.mark.parametrize("obeys", [True, False])
def test_a_network_that_obeys_its_reference_scores_high_another_one_near_0(
    tmp_path, monkeypatch, obeys
):
    levels = {f: torch.linspace(low, high, 8) for f, (_, low, high) in benchmark.FACTORS.items()}
    given = {}  # the parameters of each reference, by its pixels
    original = degrade.degrade

    def remember(hr, theta, generator=None):
        lr = original(hr, theta, generator)
        given.update({x.numpy().tobytes(): theta[[i]] for i, x in enumerate(lr)})
        return lr

    def answer(net, hr, lr_ref, t_start, num_steps, candidates, start, eta, seeds, bf16):
        assert candidates == 1 and len(set(seeds)) == len(seeds) == len(levels["blur"])
        if obeys:
            theta = degrade.Degradation.cat([given[x.numpy().tobytes()] for x in lr_ref])
            return original(hr, theta)[:, None], {}
        theta = benchmark.only("noise", torch.full((len(hr),), 5.0), noise=seeds[0])
        theta.seed = torch.tensor(seeds) % 2**31
        return original(hr, theta)[:, None], {}

    monkeypatch.setattr(degrade, "degrade", remember)
    monkeypatch.setattr(generate, "generate", answer)
    cfg = benchmark.Config(t_starts=(0, 9), repeats=2)
    rows = benchmark.table_factors(scenes(4), None, cfg)["rows"]
    assert [row["factor"] for row in rows[::3]] == list(benchmark.FACTORS)
    assert [len(row["rank"]) for row in rows[:3]] == [4, 4, 8]  # repeats where noise is drawn
    for row in rows:
        mean = np.mean(row["rank"])
        obeyed = obeys or row["answer"] == "truth"
        assert mean > 0.9 if obeyed else abs(mean) < 0.45, row["factor"]


# ---- do the extractors tell degradation and content apart? --------------------------------------


def test_retrieval_finds_the_same_theta_by_theta_and_not_by_chance():
    theta = torch.randn(64, 5, generator=common.generator(1))
    assert set(benchmark.retrieval(theta, theta + 1e-4).values()) == {1.0}
    assert set(benchmark.retrieval(theta * 9, theta * 9, standardise=True).values()) == {1.0}
    other = torch.randn(64, 5, generator=common.generator(2))
    found = benchmark.retrieval(theta, other)
    assert found["L2 top-1"] < 0.1 and found["cosine top-1"] < 0.1 and found["L2 top-5"] < 0.25
    # A code that says nothing is no better than chance, although each distance is the smallest.
    assert set(benchmark.retrieval(torch.ones(64, 5), torch.ones(64, 5)).values()) == {0.0}


def test_statistics_tell_noise_from_blur():
    hr = scenes(2)
    lr = [
        degrade.degrade(hr, benchmark.only(f, torch.full((2,), v)))
        for f, v in (("blur", 1.5), ("noise", 15.0), ("blur", 1.5), ("noise", 15.0))
    ]
    queries = torch.cat([benchmark.statistics(x)[:1] for x in lr[:2]])
    candidates = torch.cat([benchmark.statistics(x)[1:] for x in lr[2:]])
    assert benchmark.retrieval(queries, candidates, standardise=True)["L2 top-1"] == 1


def test_devices_are_sub_folders_and_give_two_files_each(tmp_path):
    for device, count in (("a", 3), ("b", 2), ("c", 1)):
        for number in range(count):
            write(tmp_path / device / f"{number}.png", photo(number, 64))
    write(tmp_path / "d/0.png", photo(0, 16))  # too small
    write(tmp_path / "d/1.png", photo(1, 64))
    files = common.list_images([str(tmp_path)], "--lr")
    queries, candidates = benchmark.device_crops(files, 32, 9, seed=0)
    assert queries.shape == candidates.shape == (2, 3, 32, 32)
    assert not any(torch.equal(q, c) for q, c in zip(queries, candidates, strict=True))
    assert benchmark.device_crops(files[:3], 32, 9, seed=0) == []  # one device


def test_both_tables_run_from_the_command_line_with_the_shipped_weights(tmp_path):
    hr = drawn_folder(tmp_path / "hr")
    for device in ("a", "b"):
        for number in range(2):
            write(tmp_path / "lr" / device / f"{number}.png", photo(number, 48))
    shipped = ROOT / "data/pretrained"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--table", "factors", "extractors"]
    command += ["--hr", str(hr), "--lr", str(tmp_path / "lr"), "--images", "2", "--crop", "32"]
    command += ["--checkpoint", str(shipped / "diffusion.safetensors"), "--t-starts", "9"]
    command += ["--extractors", str(shipped / "extractors.safetensors"), "--repeats", "1"]
    command += ["--num-steps", "1", "--device", "cpu", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    rows = results["factors"]["rows"]
    assert len(rows) == 4 * 2 and all(np.isfinite(row["rank"]).all() for row in rows)
    assert {row["task"] for row in results["extractors"]["retrieval"]} == {
        "theta, realesrgan",
        "theta, camera",
        "device",
    }
    text = (tmp_path / "out/factors.md").read_text()
    assert "| blur | truth | 1.000 |" in text and "| jpeg | T=9 |" in text
    text = (tmp_path / "out/extractors.md").read_text()
    assert "| device | E_deg |" in text and "| clean, with codebook |" in text
    assert text in done.stdout and "nan" not in text


# ---- the command line ---------------------------------------------------------------------------


def test_the_presets_of_generation_serve_here_too():
    for preset in generate.PRESETS.values():
        benchmark.Config(**preset)


def unequal_names(folder):
    (folder / "LR/Canon_1.png").rename(folder / "LR/Canon_7.png")


def unequal_scales(folder):
    write(folder / "HR/Canon_2.png", photo(0, 96))


def fractional_scale(folder):
    write(folder / "HR/Canon_1.png", photo(0, 200))


def no_lr(folder):
    (folder / "LR").rename(folder / "lq")


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


def nothing(folder):
    pass


@pytest.mark.parametrize(
    "spoil, options, sentence",
    [
        (nothing, "", "--pairs is missing"),
        (nothing, "--pairs nowhere", "there is no folder HR/"),
        (no_lr, "--pairs set", "there is no folder LR/"),
        (empty_hr, "--pairs set", "no images there"),
        (
            unequal_names,
            "--pairs set",
            "2 names are only in one of HR/ and LR/, such as Canon_1, Canon_7",
        ),
        (unequal_scales, "--pairs set", "Canon_2 has 96 x 96 and 48 x 48 pixels"),
        (fractional_scale, "--pairs set", "Canon_1 has 200 x 200 and 48 x 48 pixels"),
        (tiny, "--pairs set", "under 32 x 32"),
        (same_stem_twice, "--pairs set", "differ in their suffix only"),
        (all_corrupt, "--pairs set", "none of its pairs can be read"),
        (nothing, "--pairs set --table 1", "choose among 2, sampling, factors, extractors"),
        (nothing, "--table 2 factors", "--pairs is missing"),
        (nothing, "--table factors --hr nowhere", "--hr nowhere: no such file or folder"),
        (nothing, "--table factors --hr set/LR --crop 32", "0 are photos of 128 x 128"),
        (nothing, "--table factors --crop 60", "must be a multiple of 8"),
        (nothing, "--table extractors --extractors no.pt", "--extractors no.pt: no such file"),
        (nothing, "--table extractors --hr set/HR --crop 32 --lr nowhere", "--lr nowhere: no such"),
        (nothing, "--pairs set --batch-size 0", "must be at least 1"),
        (nothing, "--pairs set --start noise", "not a start image"),
        (nothing, "--pairs set --checkpoint no.pt", "no such file"),
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

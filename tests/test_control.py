"""The control and the transfer function: planted kernels are found again, shares mean shares."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import scenes, write_pairs
from PIL import Image
from scipy import ndimage

import degrade
from bench import control, generated, kernels
from bench.inputs import Config, Inputs, resolved
from common import UserError
from common.photos import load_image, save_image, to_uint8
from common.runtime import Runtime

CPU = Runtime(torch.device("cpu"))


def gaussian_kernel(sigma):
    """A Gaussian (24, 24) of sigma HR pixels around the middle of an LR pixel."""
    x = torch.arange(control.TAPS) - control.BEFORE - 1.5
    taps = (-(x.double() ** 2) / (2 * sigma**2)).exp()
    return (taps[:, None] * taps) / taps.sum() ** 2


def test_the_bicubic_kernel_is_pillows():
    hr = scenes(1)[0]
    image = Image.fromarray(to_uint8(hr).permute(1, 2, 0).numpy())
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) / 255
    lr = kernels.reduced_by(kernels.bicubic_kernel(), to_uint8(hr) / 255)
    inner = (slice(None), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(lr.permute(1, 2, 0).numpy()[4:-4, 4:-4], expected[4:-4, 4:-4],
                               atol=1.01 / 255)  # fmt: skip
    assert lr[inner].shape == (3, 40, 40)


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_a_kernel_is_found_again_from_its_images(sigma):
    hr, kernel = scenes(3), gaussian_kernel(sigma)
    equations = [kernels.normal_equations(x, kernels.reduced_by(kernel, x)[None]) for x in hr]
    equations = [(AA, Ay[0]) for AA, Ay in equations]
    found = kernels.fitted_kernel(equations)
    f = torch.linspace(0, 0.5, 6)
    expected = (-2 * (np.pi * f.double() * sigma / 4) ** 2).exp()  # of a Gaussian, in closed form
    torch.testing.assert_close(kernels.transfer_function(kernel, f), expected, atol=0.01, rtol=0)
    amplitude = kernels.transfer_function(found, f)
    torch.testing.assert_close(amplitude, expected, atol=0.04, rtol=0)
    error = kernels.reduced_by(found, hr[0]) - kernels.reduced_by(kernel, hr[0])
    assert 255 * error.abs().mean() < 0.5


def test_the_transfer_function_of_bicubic_is_that_of_keys_cubic():
    """The mean over all angles equals a slow sum over the plane."""
    kernel, f = kernels.bicubic_kernel(), torch.tensor([0.0, 0.2, 0.5])
    place = (np.arange(24) - control.BEFORE - 1.5) / 4
    expected = []
    for frequency in f.tolist():
        values = []
        for angle in np.arange(24) * np.pi / 24:
            wave = np.cos(2 * np.pi * frequency * (np.sin(angle) * place[:, None]
                                                   + np.cos(angle) * place))  # fmt: skip
            values.append(abs((kernel.numpy() * wave).sum()))
        expected.append(np.mean(values))
    found = kernels.transfer_function(kernel, f)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[0] == pytest.approx(1) and 0.5 < found[2] < 0.64


def test_a_blur_is_seen_in_the_spectra_of_other_scenes_alone():
    photos = scenes(16, 128)
    blurred = [torch.from_numpy(ndimage.gaussian_filter(x, (0, 0.8, 0.8))) for x in photos[:8]]
    of, to = ([control.log_spectrum(x) for x in images] for images in (blurred, photos[8:]))
    ratio = control.amplitude_ratio(of, to)
    expected = (-2 * (np.pi * control.FREQUENCIES * 0.8) ** 2).exp()
    torch.testing.assert_close(ratio[:13], expected[:13], atol=0.12, rtol=0)  # up to .3 cycles
    same = control.amplitude_ratio(to, to)
    torch.testing.assert_close(same, torch.ones_like(same))


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Pairs of two cameras whose real LR is sharpened, and a generator that answers bicubically."""
    for number, hr in enumerate(scenes(6, 128)):
        name = f"{'AB'[number % 2]}_{number}"
        theta = degrade.bicubic_reduction(1, 4)
        lr = degrade.degrade(hr[None], theta)[0]
        blurred = torch.from_numpy(ndimage.gaussian_filter(lr, (0, 1, 1)))
        save_image(tmp_path / f"set/HR/{name}.png", hr)
        save_image(tmp_path / f"set/LR/{name}.png", (lr + 0.5 * (lr - blurred)).clamp(0, 1))
        save_image(tmp_path / f"photos/{name}.png", hr)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))

    def answer(net, hr, lr_ref, sampler, seeds):
        return generated.bicubic(hr, [], [])[:, None], {"kept": torch.zeros(len(hr)).long()}

    monkeypatch.setattr("generate.load_generator", lambda *_: SimpleNamespace(t_max=500))
    monkeypatch.setattr("generate.generate", answer)
    monkeypatch.setattr(
        control, "mean_degradations", lambda pairs, *_: {p.index: None for p in pairs}
    )
    folders = {name: (str(tmp_path / name),) for name in ("set", "photos")}
    cfg = Config(pairs=folders["set"], hr=folders["photos"], out=str(tmp_path / "out"),
                 crop=32, sr_steps=2, t_starts=(0,))  # fmt: skip
    return Inputs(resolved(cfg, CPU), CPU)


def test_the_transfer_function_of_sharpened_lr_is_raised(inputs):
    values, text = control.table_mtf("mtf", inputs)()
    curves = values["set"]["curves"]
    assert curves["bicubic"][12] == pytest.approx(0.9, abs=0.03)  # .3 cycles
    assert curves["real LR"][12] > curves["bicubic"][12] + 0.15
    np.testing.assert_allclose(curves["RealDGen"], curves["bicubic"], atol=1e-6)
    assert values["set"]["n"] == {"real LR": 6, "real LR, A": 3, "real LR, B": 3} | dict.fromkeys(
        [name for name in curves if not name.startswith("real")], 6
    )
    ratio = values["set"]["ratios"]["real LR, HR photos of others"]
    assert ratio[12] > 1.1 and "| RealDGen | 1.00 |" in text
    with Image.open(f"{inputs.cfg.out}/mtf.png") as picture:
        assert picture.width > 300


def test_only_the_lr_differs_and_nothing_of_the_tested_half_is_in_it(inputs, tmp_path):
    values, text = control.table_control("control", inputs)()
    sets = next((tmp_path / "out/sets").iterdir()) / "control"
    names = {file.name for file in (sets / "hr").iterdir()}
    assert names == {f"set_{name}.png" for name in ("A_0", "A_4", "B_1", "B_5")}
    tested = set(values["rows"]["bicubic"][0]["set"]["images"])
    assert tested == {"A_2", "B_3"}
    folders = {folder.name: folder for folder in sets.iterdir() if folder.name != "hr"}
    assert len(folders) == len(values["rows"]) == 14
    for folder in folders.values():
        assert {file.name for file in (folder / "lr").iterdir()} == names
        assert (folder / "hr").resolve() == (sets / "hr").resolve()
    real, bicubic, pair = (
        torch.stack([load_image(folders[k] / "lr" / name) for name in sorted(names)])
        for k in ("real-LR-oracle-", "bicubic", "kernel-of-each-pair-noise-0")
    )
    files = [tmp_path / f"set/LR/{name[4:]}" for name in sorted(names)]
    assert torch.equal(real, torch.stack([load_image(file) for file in files]))
    inner = (..., slice(4, -4), slice(4, -4))
    assert F.mse_loss(pair[inner], real[inner]) < 0.2 * F.mse_loss(bicubic[inner], real[inner])
    assert "| bicubic | " in text and text.count("| 0% |") >= 1


def test_the_share_of_the_gap_is_0_for_bicubic_1_for_the_oracle_and_linear(inputs):
    def runs(psnr):
        return [{"set": {"mean": {"PSNR Y": psnr}}}]

    rows = {"real LR (oracle)": runs(28), "bicubic": runs(27), "half": runs(27.5), "no": runs(26)}
    result = {"network": "fsrcnn", "trained": {"set": 4}, "rows": rows}
    lines = control.text_of_control(result, inputs).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines if "2" in line
             and line.startswith("|")}  # fmt: skip
    assert {k: cells[k] for k in rows} == {
        "real LR (oracle)": "100%", "bicubic": "0%", "half": "50%", "no": "-100%"
    }  # fmt: skip


def test_noise_of_a_fitted_kernel_has_its_level(inputs):
    sets = {"set": inputs.sets["set"][:2]}
    answers = control.answers_of_control(sets, inputs)
    pair = sets["set"][0]
    hr = control.load_hr(pair)
    plain, noisy = (answers[f"kernel of each pair*, noise {n}"]("set", pair, hr) for n in (0, 3))
    assert 255 * (noisy - plain).std().item() == pytest.approx(3, rel=0.05)


def test_a_set_without_other_scenes_is_one_sentence(tmp_path):
    cfg = Config(pairs=(str(write_pairs(tmp_path / "x", ["a_1", "b_1"])),), table=("mtf",))
    with pytest.raises(UserError, match="--pairs x: no camera has two pairs"):
        control.table_mtf("mtf", Inputs(resolved(cfg, CPU), CPU))

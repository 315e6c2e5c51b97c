"""bench/control.py: training sets differ in the LR alone, shares mean shares."""

import pytest
import torch
import torch.nn.functional as F
from drawn import bicubic_for_realdgen, inputs_of, write_sharpened_pairs

from bench import control
from common.images import load_image


@pytest.fixture
def inputs(tmp_path, monkeypatch, no_metric_weights):
    monkeypatch.chdir(tmp_path)  # no runs/ with other weights
    write_sharpened_pairs(tmp_path / "set")
    bicubic_for_realdgen(monkeypatch)
    return inputs_of(pairs=(str(tmp_path / "set"),), hr=(str(tmp_path / "set/HR"),),
                 out=str(tmp_path / "out"), crop=32, sr_steps=2, t_starts=(0,))  # fmt: skip


def test_only_the_lr_differs_and_nothing_of_the_tested_half_is_in_it(inputs, tmp_path):
    values, text = control.table_control("control", inputs)()
    sets = next((tmp_path / "out/sets").iterdir()) / "control"
    names = {file.name for file in (sets / "hr").iterdir()}
    assert names == {f"set_{name}.png" for name in ("A_0", "A_4", "B_1", "B_5")}
    tested = set(values["rows"]["bicubic"][0]["set"]["images"])
    assert tested == {"A_2", "B_3"}
    folders = {folder.name: folder for folder in sets.iterdir() if folder.name != "hr"}
    assert len(folders) == len(values["rows"]) == 15
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
    pairs = inputs.sets["set"][:2]
    kinds = control.kinds_of_lr(pairs, inputs)
    hr = control.load_hr(pairs[0])[None]
    plain, noisy = (kinds[f"kernel of each pair*, noise {n}"](hr, pairs[:1]) for n in (0, 3))
    assert 255 * (noisy - plain).std().item() == pytest.approx(3, rel=0.05)

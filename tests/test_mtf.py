"""bench/mtf.py: the transfer function of real and generated LR, as numbers and as a plot."""

from functools import partial

import numpy as np
import pytest
from drawn import bicubic_for_realdgen, few_draws_of_theta, inputs_of, write_sharpened_pairs
from PIL import Image

from bench import mtf


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Inputs with sharpened real LR of two cameras, for some flags."""
    folder = write_sharpened_pairs(tmp_path / "set")
    bicubic_for_realdgen(monkeypatch)
    few_draws_of_theta(monkeypatch)
    return partial(inputs_of, pairs=(str(folder),), out=str(tmp_path / "out"), t_starts=(0,))


def test_the_transfer_function_of_sharpened_lr_is_raised(inputs):
    inputs = inputs()
    values, text = mtf.table_mtf("mtf", inputs)()
    curves = values["set"]["curves"]
    assert curves["bicubic"][12] == pytest.approx(0.9, abs=0.03)  # .3 cycles
    assert curves["real LR"][12] > curves["bicubic"][12] + 0.15
    np.testing.assert_allclose(curves["RealDGen"], curves["bicubic"], atol=1e-6)
    assert values["set"]["n"] == {"real LR": 6, "real LR, A": 3, "real LR, B": 3} | dict.fromkeys(
        [name for name in curves if not name.startswith("real")], 6
    )
    assert "| RealDGen | 1.00 |" in text
    with Image.open(f"{inputs.cfg.out}/mtf.png") as picture:
        assert picture.width > 300


def test_the_mean_of_others_is_of_all_scenes_not_only_of_the_chosen_ones(inputs):
    found = mtf.table_mtf("mtf", inputs(images=4))()[0]["set"]  # three of A, one of B
    assert found["n"]["RealDGen"] == 4 and found["n"]["RealDGen, mean F_deg"] == 4

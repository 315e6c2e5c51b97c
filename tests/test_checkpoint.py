"""common/checkpoint.py and tools/export.py: weights and what is stored with them."""

import pickle

import pytest
import torch

from common import UserError
from common.checkpoint import load_checkpoint, load_weights
from tests.commands import run
from tests.test_run import toy_net


@pytest.mark.parametrize("name", ["", "params", "params_ema", "state_dict", "ema"])
def test_weights_of_other_programs_are_found(tmp_path, name):
    net, given = toy_net(), {key: torch.rand_like(v) for key, v in toy_net().state_dict().items()}
    others = {"params": toy_net().state_dict()} if name == "params_ema" else {}
    torch.save({**others, name: given} if name else given, tmp_path / "x.pth")
    load_weights(net, str(tmp_path / "x.pth"), "--start-from")
    assert all(torch.equal(value, given[key]) for key, value in net.state_dict().items())


WRONG = {
    "list": [1], "no dict": {"ema": [1]}, "other names": {"ema": {"a": 3}},
    "other types": {key: value.to(torch.int8) for key, value in toy_net().state_dict().items()},
    "not finite": {key: value / 0 for key, value in toy_net().state_dict().items()},
    "empty": b"", "text": b"not a checkpoint", "zeros": bytes(1000), "cut": None,
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_damaged_or_do_not_fit_are_one_sentence(tmp_path, wrong, suffix):
    path, content = tmp_path / f"x.{suffix}", WRONG[wrong]
    torch.save(content or toy_net().state_dict(), path)
    if isinstance(content, bytes | None):
        path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=f"x.{suffix}: ") as error:
        load_weights(toy_net(), str(path), "--start-from")
    assert "\n" not in str(error.value)


class Trap:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self):
        return print, ("the trap was unpickled",)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_with_an_object_in_it_is_refused(tmp_path, capsys):
    torch.save({"net": Trap()}, tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("x.pt", "y.pt"):
        with pytest.raises(UserError, match=f"{name}: .*store its weights: torch.save"):
            load_checkpoint(tmp_path / name)
    assert "trap" not in capsys.readouterr().out


def test_exported_weights_keep_their_config_but_no_path_of_the_machine(tmp_path):
    config = {"lr": [str(tmp_path)], "out": str(tmp_path), "widths": [8, 16], "learning_rate": 1e-4}
    state = {"step": 7, "ema": {"a": torch.rand(3)}, "config": config | {"extractors": config}}
    torch.save(state, tmp_path / "x.pt")
    flags = ("--checkpoint", "x.pt", "--out", "x.safetensors")
    assert run("tools.export", *flags, cwd=tmp_path).returncode == 0
    read = load_checkpoint(tmp_path / "x.safetensors")
    kept = {"widths": [8, 16], "learning_rate": 1e-4}
    assert read["config"] == kept | {"extractors": kept}
    assert torch.equal(read["ema"]["a"], state["ema"]["a"].half().float())

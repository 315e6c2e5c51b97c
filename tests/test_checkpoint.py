"""common/checkpoint.py and tools/export.py: weights and what is stored with them."""

import pickle
from pathlib import Path

import pytest
import torch

from common import UserError
from common.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_weights,
    save_state,
    save_weights,
)
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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_flipped_bit_is_found_or_was_of_no_use(tmp_path, suffix):
    path, net = tmp_path / f"x.{suffix}", toy_net()
    if suffix == "pt":
        save_state(path, {"ema": net.state_dict(), "config": {"a": [1, "b"]}, "step": 3})
    else:
        save_weights(path, net.state_dict(), config={"a": [1, "b"]})
    content, state = path.read_bytes(), load_checkpoint(path)
    found, places = 0, range(7, len(content), len(content) // 99)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            read = load_checkpoint(path)
        except UserError:
            found += 1
        else:  # in padding, or in what is not read
            assert read["ema"].keys() == state["ema"].keys()
            assert all(torch.equal(read["ema"][k], v) for k, v in state["ema"].items())
    assert found > len(places) // 2


def test_the_checkpoint_before_is_found_where_the_last_is_damaged_or_gone(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    last, before = Path("runs/x/last.pt"), Path("runs/x/before.pt")
    for path in (before, last):
        save_state(path, {"ema": {}, "config": {}, "step": 1})
    assert find_checkpoint("", "x", "make") == find_checkpoint(str(last), "x", "make") == last
    last.write_bytes(last.read_bytes()[:100])
    assert find_checkpoint("", "x", "make") == find_checkpoint(str(last), "x", "make") == before
    assert "no readable checkpoint" in capsys.readouterr().out
    last.unlink()
    assert find_checkpoint("", "x", "make") == before
    before.unlink()
    with pytest.raises(UserError, match="make them with `make`"):
        find_checkpoint("", "x", "make")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr("common.checkpoint.save_file", full)
    for save in (save_state, save_weights):
        with pytest.raises(UserError, match="x.pt could not be written; is the disk full"):
            save(tmp_path / "x.pt", {})
    assert not list(tmp_path.iterdir())

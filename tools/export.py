"""Export the averaged weights of a training, in half precision, to publish them.

In: a checkpoint of extractors.py or diffusion.py. Out: a .safetensors file with its weights, its
settings without the paths of this machine, its step and its calibration.

    python -m tools.export --checkpoint runs/diffusion/last.pt --out diffusion.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import require
from common.checkpoint import load_checkpoint, save_weights
from common.cli import launch
from common.folder import out_folder
from common.runtime import Runtime

PATHS = {"hr", "lr", "out", "checkpoint", "start_from", "vqvae"}  # settings that are paths


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without the paths of the machine that trained."""
    kept = {key: value for key, value in config.items() if key not in PATHS}
    return {k: without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


@dataclass(frozen=True)
class Config:
    """Settings of the command; every field is a flag."""

    checkpoint: str = "runs/diffusion/last.pt"  # checkpoint of a training
    out: str = "diffusion.safetensors"  # file to write
    seed: ClassVar[int] = 0
    device: ClassVar[str] = "cpu"


def main(cfg: Config, rt: Runtime) -> None:
    """Write the file."""
    require(Path(cfg.checkpoint).is_file(), f"--checkpoint {cfg.checkpoint}: no such file.")
    wrong = f"--out {cfg.out}: must be a file name that ends in .safetensors."
    require(cfg.out.endswith(".safetensors"), wrong)
    state = load_checkpoint(cfg.checkpoint)
    trained = f"--checkpoint {cfg.checkpoint}: not the checkpoint of a training."
    require(bool(state["config"]) and "step" in state, trained)
    out_folder(Path(cfg.out).parent, rt).check([Path(cfg.out)])
    half = {key: value.half() for key, value in state["ema"].items()}
    facts = {key: state[key] for key in ("step", "calibration")}
    save_weights(cfg.out, half, config=without_paths(state["config"]), **facts)
    print(f"step {state['step']} of {cfg.checkpoint} is in {cfg.out}")


if __name__ == "__main__":
    launch(main, Config, {}, __doc__)

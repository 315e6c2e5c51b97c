"""The run of a training: optimiser, averaged weights, log, checkpoints, resuming."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from common import UserError, require
from common.checkpoint import before, check_weights, fingerprint, load_checkpoint, save_state
from common.folder import out_folder
from common.runtime import Runtime, make_generator, noted_signals, of_all, together


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings that all trainings have."""

    ema_decay: float = 0.999  # of the averaged weights
    cooldown: float = 0.0  # last share of the steps, in which the learning rate falls to 0
    bf16: bool = True  # where the device has it
    log_every: int = 50
    save_every: int = 500
    accumulate: int = 0  # micro-batches into which a batch is divided; 0: as memory requires
    compile: bool = True  # torch.compile
    seed: int = 0
    device: str = "auto"

    # Flags that may change when a run is resumed. The weights that it started from may not change,
    # but their files may move: the fact `began` tells them apart.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "out", "start_from", "steps", "batch_size", "accumulate", "log_every", "save_every",
        "cooldown", "compile", "bf16", "device",
    )  # fmt: skip


TRAINING_RANGES = {"accumulate": (0, 2**16), "log_every": (1, 2**31), "save_every": (1, 2**31),
                   "cooldown": (0, 1), "ema_decay": (0, 1)}  # fmt: skip


def check_micro_batches(cfg: Any, least: int = 1, sources: int = 1) -> None:
    """UserError unless --accumulate divides the batch into equal micro-batches.

    A batch has equally many images of each of the sources, a micro-batch at least `least` of each.
    """
    number = cfg.accumulate or 1
    images, rest = divmod(cfg.batch_size, sources * number)  # of each source in a micro-batch
    flags = f"--batch-size {cfg.batch_size}" + f" --accumulate {number}" * (number > 1)
    each = " of each kind" * (sources > 1)
    wrong = f"{flags}: must give {number} equal micro-batches of {least} or more images{each}."
    require(rest == 0 and images >= least, wrong)


def files_of_run(path: Path) -> list[Path]:
    """The files that a run with this checkpoint writes."""
    return [path, before(path), path.with_suffix(".png"), path.with_name("log.jsonl")]


def lock_runs(out: str | Path, names: Sequence[str], rt: Runtime) -> None:
    """Lock the folder of runs with these names; UserError for a file in it that is not of a run."""
    folder = out_folder(out, rt)
    for path in (Path(out) / f"{name}.pt" for name in names):
        kept = [p for p in (path, before(path)) if p.is_file()]
        unknown = [p for p in kept if folder.name_of(p) not in folder.ours]
        for file in unknown:  # of a version without records, or copied from elsewhere
            no_run = f"{file} is no checkpoint of a training: move it or give another --out."
            require({"step", "opt"} <= load_checkpoint(file).keys(), no_run)
        folder.check(() if unknown else files_of_run(path))
    if rt.is_main:
        folder.clean(folder.root)


def average_gradients(parameters: list[nn.Parameter], rt: Runtime) -> None:
    """Average the gradients over all processes, in one message.

    DistributedDataParallel would forbid a loss to call other methods of its network than forward.
    """
    if rt.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = _flatten_dense_tensors(gradients)
    with together():
        dist.all_reduce(flat)
    averages = _unflatten_dense_tensors(flat / rt.world_size, gradients)
    torch._foreach_copy_(gradients, averages)


def more_micro_batches(number: int, batch: int, least: int) -> int:
    """At least twice the number of equal micro-batches, if each can have `least` images.

    UserError if a batch can't be divided any further.
    """
    possible = [n for n in range(number + 1, batch // least + 1) if batch % n == 0]
    short = f"the memory of the GPU is too small for {batch // number} images of the batch at once"
    require(bool(possible), f"{short}: give a smaller --crop, or stop other programs on it.")
    return next((n for n in possible if n >= 2 * number), possible[-1])


def compile_networks(networks: Sequence[nn.Module], rt: Runtime) -> None:
    """Apply torch.compile; where it does not work, print a sentence and go on without it.

    For each shape anew: a training has few, and for shapes in general the compiler may fail.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=rt.device))
    except Exception as error:  # of many types; most often a C++ compiler is missing
        if rt.is_main:
            print(f"torch.compile does not work here ({type(error).__name__}): training without it")
        return
    torch._dynamo.config.recompile_limit = 64  # of a block, which many networks share
    for net in networks:
        net.compile(dynamic=False)


class Run:
    """A training of a network: everything but the loss.

        run = Run(cfg, rt, net, groups, path, steps)
        for *images, draw in run.batches(crops):
            run.update(loss, net, *images, draw)  # calls loss(net, *images, draw)

    The loss returns a dict of tensors: "loss" is minimised, all are logged.
    `groups` are the parameter groups of AdamW; all other parameters are frozen. In the end `net`
    has the averaged weights. The checkpoint `path` is a dict of step, steps, net, ema, opt, config,
    micro_batches; a run resumes from it if the configuration, but for MAY_CHANGE, and the `facts`
    of what it starts from are equal. Batches and draws depend on (seed, step, micro-batch) alone,
    so 1 process with 2 micro-batches computes what 2 processes do. preview() may draw a picture;
    the numbers that it returns are logged.
    """

    def __init__(
        self,
        cfg: Any,
        rt: Runtime,
        net: nn.Module,
        groups: list[dict[str, Any]],
        path: Path,
        steps: int,
        preview: Callable[[], dict[str, Tensor]] = dict,
        **facts: Any,
    ) -> None:
        self.cfg, self.rt, self.net, self.path, self.steps = cfg, rt, net, path, steps
        self.preview, self.config = preview, dataclasses.asdict(cfg) | facts
        self.step = 0  # steps done
        self.micro_batch, self.micro_batches = 0, 1  # the next one of a step, and their number
        self.out_of_memory = False  # in this step, on any GPU
        self.clock, self.images = 0.0, 0.0  # time of the last line of the log, images since then
        self.first_loss: Tensor | None = None  # of the first step, or since the run goes on
        self.steps_too_high: Tensor | int = 0  # in a row, in which the loss was far above it
        self.stop: list[int] = []  # signals that ask to stop
        self.saving = False
        self.trained = [p for group in groups if group["lr"] > 0 for p in group["params"]]
        learns = any(group["lr"] > 0 for group in groups) or steps == 0
        require(learns, "all learning rates are 0: there is nothing to train.")
        net.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.requires_grad_(False)
        for p in self.trained:
            p.requires_grad_(True)
        self.learning_rates = [group["lr"] for group in groups]
        self.opt = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.ema = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.before, self.log = before(path), path.with_name("log.jsonl")
        self.folder = out_folder(path.parent, rt)
        if path.is_file() or self.before.is_file():
            self.resume(self.read())
            if rt.is_main and self.folder.name_of(path) not in self.folder.ours:
                self.folder.claim(files_of_run(path), adopt=True)  # it is a run like this
        self.folder.check(files_of_run(path))
        for number in (self.step, int(fingerprint(net), 16)) if rt.world_size > 1 else ():
            differ = f"{path}: the processes do not go on from the same step and weights"
            way_out = f"copy {path.parent}, and the weights that it starts from, to all machines"
            require(len(set(of_all(number, rt))) == 1, f"{differ}: {way_out}.")
        pairs = [(self.ema[key], value) for key, value in net.state_dict().items()]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]

    def read(self) -> dict[str, Any]:
        """The last checkpoint, or the one before if the last is damaged or missing."""
        try:
            require(self.path.is_file(), f"{self.path} is missing.")
            return load_checkpoint(self.path)
        except UserError as error:
            if not self.before.is_file():
                raise
            if self.rt.is_main:
                print(f"{error} Going on from {self.before}.")
                if self.path.is_file():
                    damaged = self.path.with_suffix(".damaged")
                    self.folder.claim([damaged])
                    os.replace(self.path, damaged)
            return load_checkpoint(self.before)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; UserError unless it is of a run with the same configuration."""
        path = self.path
        advice = f"give another --{'name' if 'name' in self.config else 'out'} or delete it"
        wrong = f"{path} is no checkpoint of this training: {advice}."
        require({"step", "net", "ema", "opt"} <= state.keys(), wrong)
        step, stored = state["step"], state["config"]
        require(isinstance(stored, dict) and type(step) is int and step >= 0, wrong)
        changed = {k: v for k, v in self.config.items() if stored.get(k, "missing") != v}
        for key, value in changed.items():
            require(key != "began", f"{path} was trained from different weights: {advice}.")
            flag, old = f"--{key.replace('_', '-')}", stored.get(key, "missing")
            require(key in self.cfg.MAY_CHANGE, f"{flag} is {value}, in {path} {old}: {advice}.")
        for key, value in changed.items() if self.rt.is_main else ():
            flag = f"--{key.replace('_', '-')}"
            print(f"{path}: from now on {flag} {value} ({stored.get(key)} before)")
        for weights in (state["net"], state["ema"]):
            check_weights(weights, self.net, str(path))
        try:
            self.opt.load_state_dict(state["opt"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(wrong) from None
        self.net.load_state_dict(state["net"])
        self.ema = {key: value.to(self.rt.device) for key, value in state["ema"].items()}
        self.step = step
        if not stored.get("accumulate") and "batch_size" not in changed:
            self.micro_batches = state.get("micro_batches", 1)
        if self.rt.is_main and self.step < self.steps:
            print(f"resuming {path} at step {self.step}")
        elif self.rt.is_main and self.steps > 0:
            print(f"{path} is finished: it has {self.step} steps")

    def batches(self, *crops: Any, least: int = 1) -> Iterator[tuple[Any, ...]]:
        """Yield a micro-batch of each of the crops, and a generator, until the last step is done.

        A batch is divided as --accumulate says. Where the memory of a GPU is too small for a step,
        it is repeated in more micro-batches, each of at least `least` images.
        """
        self.micro_batches = self.cfg.accumulate or self.micro_batches
        with noted_signals(self.stop, self.rt, self.progress):
            while self.step < self.steps:
                yield from self.equal_batches(crops)
                if self.out_of_memory:
                    batch = crops[0].batch_size  # the same for all crops
                    self.micro_batches = more_micro_batches(self.micro_batches, batch, least)
                    self.out_of_memory = False
                    if self.rt.is_main:
                        print(f"memory is short: a batch is divided into {self.micro_batches} "
                              "micro-batches", flush=True)  # fmt: skip
        if self.stop:  # in the last step
            raise SystemExit(self.goes_on())
        self.net.load_state_dict(self.ema)
        self.net.eval().requires_grad_(False)

    def equal_batches(self, crops: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """batches() of one number of micro-batches, to the last step or until memory is short."""
        cfg, rt = self.cfg, self.rt
        per_step, start = rt.world_size * self.micro_batches, self.step

        def numbers() -> Iterator[int]:  # of the micro-batches of this process
            for step in range(start, self.steps):
                yield from range(step * per_step + rt.rank, (step + 1) * per_step, rt.world_size)

        counts = [c.batch_size // self.micro_batches for c in crops]
        streams = [c.batches(numbers(), n, rt.device) for c, n in zip(crops, counts, strict=True)]
        for number, *images in zip(numbers(), *streams, strict=True):
            self.images += cfg.batch_size * rt.world_size / self.micro_batches
            yield *images, make_generator(cfg.seed, number, device=rt.device)
            if self.out_of_memory and self.micro_batch == 0:
                return

    def votes(self) -> tuple[bool, bool]:
        """Whether a process was asked to stop, and whether one had too little memory.

        The message goes from CPU to CPU, so no GPU is synchronised.
        """
        votes = torch.tensor([len(self.stop), int(self.out_of_memory)])
        if self.rt.world_size > 1:
            with together():
                dist.all_reduce(votes)
        stopping, out_of_memory = (votes > 0).tolist()
        return stopping, out_of_memory

    def update(self, loss: Callable[..., dict[str, Tensor]], *arguments: Any) -> None:
        """Compute loss(*arguments) and its gradient; after the last micro-batch step, log and save.

        The loss is computed in bf16 where the device has it.
        """
        cfg, rt = self.cfg, self.rt
        if not self.out_of_memory:
            try:
                with rt.autocast(cfg.bf16):
                    losses = loss(*arguments)
                (losses["loss"] / self.micro_batches).backward()
            except torch.OutOfMemoryError:
                self.out_of_memory = True
        self.micro_batch = (self.micro_batch + 1) % self.micro_batches
        if self.micro_batch > 0:
            return
        stopping, self.out_of_memory = self.votes()
        if self.out_of_memory:  # in any process: all repeat the step
            self.opt.zero_grad(set_to_none=True)
            return torch.cuda.empty_cache()
        average_gradients(self.trained, rt)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        left = (self.steps - self.step) / max(1, cfg.cooldown * self.steps)
        for group, rate in zip(self.opt.param_groups, self.learning_rates, strict=True):
            group["lr"] = rate * min(1, left)  # falls to 0 over the last cfg.cooldown of the steps
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        # The average warms up, so that a short run does not end near its initialisation.
        decay = min(cfg.ema_decay, (1 + self.step) / (10 + self.step))
        averages, weights = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.step += 1
        value = losses["loss"].detach()
        self.first_loss = value.abs() if self.first_loss is None else self.first_loss
        self.steps_too_high = (self.steps_too_high + 1) * (value > 100 * self.first_loss)
        saving = self.step % cfg.save_every == 0 or self.step == self.steps or stopping
        if rt.is_main and (saving or self.step % cfg.log_every == 0):
            self.check_finite(value.item(), norm.item())
            if saving:  # first, because a process that is asked to stop may be killed soon
                self.save()
            self.report(losses, self.preview() if saving else {})
        if not self.clock:  # the first step does not count as speed: networks are compiled in it
            self.clock, self.images = time.time(), 0
        if stopping:
            raise SystemExit(self.goes_on())

    def goes_on(self) -> str:
        """The message of a run that was asked to stop."""
        return f"stopped at step {self.step}; the same command goes on from there"

    def progress(self) -> tuple[float, ...]:
        """Numbers that change while the run is not waiting for other processes."""
        return self.step, self.images, time.monotonic() if self.saving else 0.0

    def check_finite(self, loss: float, norm: float) -> None:
        """UserError if the loss or the norm of its gradient is not a number."""
        kept = f"{self.path} is of an earlier step" if self.path.is_file() else "nothing is saved"
        found = f"the loss is {loss}, its gradient {norm} at step {self.step}"
        require(math.isfinite(loss) and math.isfinite(norm), f"{found}; {kept}.")

    def report(self, losses: dict[str, Tensor], preview: dict[str, Tensor]) -> None:
        """Print the numbers of a step and append them to log.jsonl."""
        shown = {key: value.item() for key, value in (losses | preview).items()}
        if self.clock:
            shown["images/s"] = self.images / (time.time() - self.clock)
        if self.rt.device.type == "cuda":
            shown["GiB"] = torch.cuda.max_memory_allocated(self.rt.device) / 2**30
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        name = f"{self.path.parent.name}/{self.path.stem}"
        print(f"{name} {self.step}/{self.steps}  {text}", flush=True)
        if self.steps_too_high >= 100:
            print(f"the loss has been over 100 times that of the first step for "
                  f"{int(self.steps_too_high)} steps: stop, and try a smaller learning rate",
                  flush=True)  # fmt: skip
        self.folder.claim([self.log])
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.path.stem, "step": self.step, **shown}) + "\n")
        self.clock, self.images = time.time(), 0

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, and keep the one before."""
        state = {"step": self.step, "steps": self.steps, "net": self.net.state_dict(),
                 "ema": self.ema, "opt": self.opt.state_dict(), "config": self.config,
                 "micro_batches": self.micro_batches}  # fmt: skip
        self.folder.claim([self.before])
        self.saving = True
        save_state(self.path, state, keep=self.before)
        self.saving = False

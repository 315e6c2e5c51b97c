"""The run of a training: optimiser, averaged weights, log, checkpoints, resuming."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from common import UserError, require
from common.checkpoint import check_weights, load_checkpoint
from common.files import replacing
from common.runtime import Runtime, largest_of_all, make_generator


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
    batch, number = cfg.batch_size // sources, cfg.accumulate or 1
    fits = batch % number == 0 and batch // number >= least
    size = f"--batch-size {cfg.batch_size}" + f" of {sources} kinds" * (sources > 1)
    wrong = f"--accumulate {number}: {size} has not so many equal micro-batches of {least} or more."
    require(fits, wrong)


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Average the gradients over all processes, in one message.

    DistributedDataParallel would forbid a loss to call other methods of its network than forward.
    """
    if world_size > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        torch._foreach_copy_(gradients, _unflatten_dense_tensors(flat / world_size, gradients))


def micro_batches_that_fit(batch: int, least: int, cost: float, room: float) -> int:
    """The smallest number of equal micro-batches so that one takes at most `room` bytes.

    A micro-batch has at least `least` images, which take `cost` bytes. If none fits, the largest
    number.
    """
    possible = [n for n in range(1, batch // least + 1) if batch % n == 0]
    return next((n for n in possible if cost * batch / n / least <= room), possible[-1])


def compile_networks(networks: Sequence[nn.Module], rt: Runtime) -> None:
    """Apply torch.compile; where it does not work, print a sentence and go on without it."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=rt.device))
    except Exception as error:  # of many types; most often a C++ compiler is missing
        if rt.is_main:
            print(f"torch.compile does not work here ({type(error).__name__}): training without it")
        return
    for net in networks:
        net.compile()


class Run:
    """A training of a network: everything but the loss.

        run = Run(cfg, rt, net, groups, path, steps)
        for *images, draw in run.batches(crops):
            with rt.autocast(cfg.bf16):
                losses = ...        # a dict of tensors: "loss" is minimised, all are logged
            run.update(losses)

    `groups` are the parameter groups of AdamW; all other parameters are frozen. In the end `net`
    has the averaged weights. The checkpoint `path` is a dict of step, steps, net, ema, opt, config;
    a run resumes from it if the configuration, with the `facts` of what it starts from, is equal.
    Batches and draws depend on (seed, step, micro-batch) alone, so 1 process with 2 micro-batches
    computes what 2 processes do. preview() may draw a picture; the numbers that it returns are
    logged.
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
        self.step = 0  # steps done; -1 in trial()
        self.micro_batch, self.micro_batches = 0, 1  # the next one of a step, and their number
        self.clock, self.images = 0.0, 0  # time of the last line of the log, images since then
        self.stop: list[bool] = []  # SIGTERM adds an item
        self.trained = [p for group in groups for p in group["params"]]
        learns = any(group["lr"] > 0 for group in groups) or steps == 0
        require(learns, "all learning rates are 0: there is nothing to train.")
        net.to(rt.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        net.requires_grad_(False)
        for p in self.trained:
            p.requires_grad_(True)
        self.learning_rates = [group["lr"] for group in groups]
        self.opt = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.ema = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.before = path.with_name(
            "before.pt" if path.name == "last.pt" else f"before-{path.name}"
        )
        if path.is_file() or self.before.is_file():
            self.resume(self.read())
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
                    os.replace(self.path, self.path.with_suffix(".damaged"))
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
            require(key != "began", f"{path} began from other weights: {advice}.")
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
        if self.rt.is_main and self.step < self.steps:
            print(f"resuming {path} at step {self.step}")
        elif self.rt.is_main and self.steps > 0:
            print(f"{path} is finished: it has {self.step} steps; more --steps go on from there")

    def batches(self, *crops: Any, least: int = 1) -> Iterator[tuple[Any, ...]]:
        """Yield a micro-batch of each of the crops, and a generator, until the last step is done.

        A batch is divided as --accumulate says, or else as the memory of a GPU requires; each
        micro-batch has at least `least` images.
        """
        cfg, rt = self.cfg, self.rt
        self.micro_batches = cfg.accumulate or 1
        if self.step < self.steps and rt.device.type == "cuda" and not cfg.accumulate:
            yield from self.trial(crops, least)
        per_step, start = rt.world_size * self.micro_batches, self.step

        def numbers() -> Iterator[int]:  # of the micro-batches of this process
            for step in range(start, self.steps):
                yield from range(step * per_step + rt.rank, (step + 1) * per_step, rt.world_size)

        counts = [c.batch_size // self.micro_batches for c in crops]
        streams = [c.batches(numbers(), n, rt.device) for c, n in zip(crops, counts, strict=True)]
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop.append(True))
        try:
            for number, *images in zip(numbers(), *streams, strict=True):
                self.images += sum(counts) * rt.world_size
                yield *images, make_generator(cfg.seed, number, device=rt.device)
        finally:
            signal.signal(signal.SIGTERM, before)
        self.net.load_state_dict(self.ema)
        self.net.eval().requires_grad_(False)

    def trial(self, crops: Sequence[Any], least: int) -> Iterator[tuple[Any, ...]]:
        """Yield a batch of `least` images to measure its memory, and choose how a batch is divided.

        update() makes no step of it.
        """
        device, batch = self.rt.device, crops[0].batch_size  # the same for all crops
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step, self.step = self.step, -1
        torch.compiler.set_stance("force_eager")
        draw = make_generator(self.cfg.seed, -1, device=device)
        yield *(next(c.batches([0], least, device)) for c in crops), draw
        torch.compiler.set_stance("default")
        self.step = step
        cost = torch.cuda.max_memory_allocated(device) - allocated
        adam = 8 * sum(p.numel() for p in self.trained)
        torch.cuda.empty_cache()
        room = 0.9 * torch.cuda.mem_get_info(device)[0] - adam
        number = micro_batches_that_fit(batch, least, cost, room)
        self.micro_batches = int(largest_of_all(number, self.rt))
        if self.rt.is_main and self.micro_batches > 1:
            print(f"memory is short: a batch is divided into {self.micro_batches} micro-batches")

    def update(self, losses: dict[str, Tensor]) -> None:
        """Backward pass; after the last micro-batch the step, its log and its checkpoint."""
        cfg, rt = self.cfg, self.rt
        (losses["loss"] / self.micro_batches).backward()
        if self.step < 0:
            return self.opt.zero_grad(set_to_none=True)
        self.micro_batch = (self.micro_batch + 1) % self.micro_batches
        if self.micro_batch > 0:
            return
        average_gradients(self.trained, rt.world_size)
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
        together = rt.world_size == 1 or self.step % 10 == 0  # all processes stop at the same step
        stopping = together and largest_of_all(bool(self.stop), rt) > 0
        saving = self.step % cfg.save_every == 0 or self.step == self.steps or stopping
        if rt.is_main and (saving or self.step % cfg.log_every == 0):
            self.report(losses, norm, saving)
        if rt.is_main and saving:
            self.save()
        if not self.clock:  # the first step does not count as speed: networks are compiled in it
            self.clock, self.images = time.time(), 0
        if stopping:
            raise SystemExit(f"stopped at step {self.step}; the same command goes on from there")

    def report(self, losses: dict[str, Tensor], norm: Tensor, saving: bool) -> None:
        """Print the numbers of a step and append them to log.jsonl; UserError if not finite."""
        shown = {key: value.item() for key, value in losses.items()}
        finite = math.isfinite(shown["loss"]) and math.isfinite(norm.item())
        kept = f"{self.path} is of an earlier step" if self.path.is_file() else "nothing is saved"
        found = f"the loss is {shown['loss']}, its gradient {norm.item()} at step {self.step}"
        require(finite, f"{found}; {kept}.")
        speed = {}
        if self.clock:
            speed["images/s"] = self.images / (time.time() - self.clock)
        if self.rt.device.type == "cuda":
            speed["GiB"] = torch.cuda.max_memory_allocated(self.rt.device) / 2**30
        preview = self.preview() if saving else {}
        shown |= {key: value.item() for key, value in preview.items()} | speed
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        name = f"{self.path.parent.name}/{self.path.stem}"
        print(f"{name} {self.step}/{self.steps}  {text}", flush=True)
        with open(self.path.with_name("log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.path.stem, "step": self.step, **shown}) + "\n")
        self.clock, self.images = time.time(), 0

    def save(self) -> None:
        """Write the checkpoint, whole or not at all, and keep the one before."""
        state = {"step": self.step, "steps": self.steps, "net": self.net.state_dict(),
                 "ema": self.ema, "opt": self.opt.state_dict(), "config": self.config}  # fmt: skip
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
            if self.path.is_file():
                os.replace(self.path, self.before)

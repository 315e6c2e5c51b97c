"""Processes and devices, threads, random generators."""

import contextlib
import datetime
import functools
import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import UserError

A = TypeVar("A")
B = TypeVar("B")


def process_rank() -> int:
    """Rank of this process, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


@functools.cache
def print_once(line: str) -> None:
    """Print a line in the first process, and only the first time."""
    if process_rank() == 0:
        print(line)


@dataclass(frozen=True)
class Runtime:
    """Where this process runs: its device, its rank and the number of processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def autocast(self, bf16: bool) -> torch.autocast:
        """Context of bf16, if wanted and if the device has instructions for it; else of float32."""
        fast = self.device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16 and fast)


@contextlib.contextmanager
def runtime(device: str = "auto", seed: int = 0) -> Iterator[Runtime]:
    """Choose the device, seed the global generator, join the processes that torchrun started."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: this machine has no such device ({error}).") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        # FlopCounterMode imports this module. Its default arguments would hold a group made before,
        # whose threads then outlive destroy_process_group: the process would abort at its end.
        importlib.import_module("torch.distributed.nn")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # The main process may run long alone.
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    torch.manual_seed(seed)
    try:
        yield Runtime(chosen, process_rank(), world_size)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def wait_for_all(rt: Runtime) -> None:
    """Wait until all processes have come to this line."""
    if rt.world_size > 1:
        try:
            dist.barrier()
        except RuntimeError:
            raise UserError("another process has stopped.") from None


def largest_of_all(value: float, rt: Runtime) -> float:
    """The largest value among all processes."""
    if rt.world_size > 1:
        values = torch.tensor([float(value)], device=rt.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()
    return value


def in_parallel(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Yield work(item) of all items, in order, from several threads; an error cancels the rest.

    Items are taken no further ahead than 2 for each thread.
    """
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while waiting and (waiting[0].done() or len(waiting) > 2 * threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- randomness -------------------------------------------------------------------------------


def make_generator(*numbers: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of these numbers and names, such as (seed, image index)."""
    state = np.random.SeedSequence(list(str(numbers).encode())).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def randn_rows(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise (B, C, h, w) for images like these; row b comes from generators[b] alone."""
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device) for g in generators]
    return torch.stack(rows).to(like.device, non_blocking=True)

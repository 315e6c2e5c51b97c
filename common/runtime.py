"""Processes and devices, threads, random generators."""

import contextlib
import datetime
import functools
import importlib
import itertools
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import UserError, require

A = TypeVar("A")
B = TypeVar("B")

# Signals that stop a command: Ctrl-C, kill or torchrun, a closed terminal.
STOPPING = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


PATIENCE = 12.0  # torchrun kills after 30 s


class OtherStopped(UserError):
    """Another process has stopped with an error, which it prints."""


def process_rank() -> int:
    """Rank of this process, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Rank of this process among those of its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def process_count() -> int:
    """Number of processes, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
        return autocast(self.device, autocast_dtype(self.device) if bf16 else torch.float32)


def autocast_dtype(device: torch.device, training: bool = True) -> torch.dtype:
    """The fastest type for convolutions and attention in which a network trains or generates.

    A GPU before Ampere has no bf16: there attention would store all its scores. It has float16,
    whose small range is enough to generate; gradients would need a scaler, so it trains in float32.
    A CPU generates in float32, because sums in bf16 depend on the number of threads.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16
        return torch.float32 if training else torch.float16
    fast = training and device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which matrix products and convolutions are of this type."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def choose_device(device: str) -> torch.device:
    """The device of this process, by --device; UserError if there is none for it.

    Each process has a GPU of its own: that of its number on the machine, or the only one it sees.
    """
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        print_once("training and generation take float64, which MPS does not have: using the CPU")
        device = "cpu"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if count > 1:
            needed = max(processes, local_rank() + 1)
            require(needed <= count, too_many(needed, count))
            device = f"cuda:{local_rank()}"
        else:  # of the machine, or by CUDA_VISIBLE_DEVICES; join_processes() tells apart
            device = "cuda:0"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: this machine has no such device ({error}).") from None
    return chosen


def too_many(processes: int, count: int) -> str:
    """The sentence for more processes than GPUs."""
    gpus = f"{count} GPU" + "s" * (count > 1)
    return f"{processes} processes, but {gpus}: start one for each GPU (--nproc_per_node)."


def join_processes(device: torch.device, rank: int, world_size: int) -> None:
    """Join the other processes; UserError if two of them have the same GPU."""
    # FlopCounterMode imports this module. Its default arguments would hold a group made before,
    # whose threads then outlive destroy_process_group: the process would abort at its end.
    importlib.import_module("torch.distributed.nn")
    store, _, _ = next(dist.rendezvous("env://"))
    if device.type == "cuda":
        gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
        store.set(f"gpu {rank}", gpu)
        gpus = [store.get(f"gpu {i}").decode() for i in range(world_size)]
        require(len(set(gpus)) == world_size, too_many(world_size, len(set(gpus))))
    long = datetime.timedelta(days=1)  # the main process may run long alone
    store.set_timeout(long)
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=long, store=store, rank=rank, world_size=world_size)
    if on_gpu:  # NCCL takes its memory at the first message: now, while there is enough
        dist.all_reduce(torch.zeros(1, device=device))


@contextlib.contextmanager
def runtime(device: str = "auto", seed: int = 0) -> Iterator[Runtime]:
    """Choose the device, seed the global generator, join the processes that torchrun started.

    After an error the group is left as it is, because the others may be waiting in it: the process
    has to end (common.cli.launch).
    """
    chosen, world_size = choose_device(device), process_count()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        join_processes(chosen, process_rank(), world_size)
    torch.manual_seed(seed)
    yield Runtime(chosen, process_rank(), world_size)
    if world_size > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Context of a message to all processes: OtherStopped where another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise OtherStopped(f"another process has stopped ({reason}).") from None


def wait_for_all(rt: Runtime) -> None:
    """Wait until all processes have come to this line."""
    if rt.world_size > 1:
        with together():
            dist.barrier()


def of_all(value: A, rt: Runtime) -> list[A]:
    """The values of all processes, by rank; it waits for all."""
    values = [value] * rt.world_size
    if rt.world_size > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def no_endless_wait(progress: Callable[[], object]) -> Iterator[None]:
    """End this process `PATIENCE` seconds after a signal if it has made no progress since.

    It may be waiting for another one that is gone; on a GPU nothing else ends that.
    """
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    inside = True

    def watch() -> None:  # the main thread runs no handler while it waits for the GPU
        with woken:
            signalled = woken.recv(1)  # empty where the block has ended
        earlier: object = None
        while signalled and inside and earlier != (earlier := progress()):
            time.sleep(PATIENCE)
        if signalled and inside:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        inside = False
        signal.set_wakeup_fd(before)
        waker.close()


@contextlib.contextmanager
def noted_signals(noted: list[int], rt: Runtime, progress: Callable[[], object]) -> Iterator[None]:
    """Append the signals that ask to stop to a list, in place of what they do otherwise.

    progress() changes as long as this process is not waiting for others.
    """
    handlers = {sent: signal.getsignal(sent) for sent in STOPPING}
    for sent in STOPPING:
        signal.signal(sent, lambda number, frame: noted.append(number))
    waits = rt.world_size > 1 and rt.device.type == "cuda"
    try:
        with no_endless_wait(progress) if waits else contextlib.nullcontext():
            yield
    finally:
        for sent, handler in handlers.items():
            signal.signal(sent, handler)


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


Loaded = TypeVar("Loaded", bound=tuple)  # begins with an image (3, H, W)
BATCH = 32 * 512**2  # pixels, on a GPU


def of_equal_size(images: Iterable[Loaded], pixels: int) -> Iterator[list[Loaded]]:
    """Group images of equal size until they have so many pixels, or too many images wait."""
    waiting: dict[tuple[torch.Size, torch.dtype], list[Loaded]] = {}
    for loaded in images:
        image = loaded[0]
        batch = waiting.setdefault((image.shape, image.dtype), [])
        batch.append(loaded)
        if len(batch) * image[0].numel() >= pixels or sum(map(len, waiting.values())) > 256:
            yield waiting.pop((image.shape, image.dtype))
    yield from waiting.values()


def halved(work: Callable[[list[A]], B], batch: list[A]) -> list[B]:
    """[work(batch)]; if that takes too much memory of the GPU, the results of its parts.

    UserError if there is too little for a single image.
    """
    try:
        return [work(batch)]
    except torch.OutOfMemoryError as error:
        short = f"the memory of the GPU is too small for one image ({str(error).split('.')[0]})"
        way_out = "stop other programs on it, give smaller images, or --device cpu"
        require(len(batch) > 1, f"{short}: {way_out}.")
    torch.cuda.empty_cache()  # not before: the error holds the tensors of work()
    half = len(batch) // 2
    return [*halved(work, batch[:half]), *halved(work, batch[half:])]


def in_batches(
    load: Callable[[A], Loaded | None],
    work: Callable[[list[Loaded]], B],
    items: Iterable[A],
    device: torch.device,
) -> Iterator[B]:
    """Yield work() of batches of images of equal size, which load() reads in threads.

    On a CPU each image is a batch and gets one core: then no result depends on their number.
    """
    on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    loaded = (image for image in in_parallel(load, items, 2 if on_cpu else 8) if image is not None)
    batches = of_equal_size(loaded, 1 if on_cpu else BATCH)
    try:
        if on_cpu:
            torch.set_num_threads(1)
            yield from in_parallel(work, batches, threads)
        else:
            yield from itertools.chain.from_iterable(halved(work, batch) for batch in batches)
    finally:
        torch.set_num_threads(threads)


# ---- randomness -------------------------------------------------------------------------------


def make_generator(*numbers: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of these numbers and names, such as (seed, image index)."""
    state = np.random.SeedSequence(list(str(numbers).encode())).generate_state(2, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def randn_rows(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise (B, C, h, w) for images like these; row b comes from generators[b] alone."""
    rows = [torch.randn(like.shape[1:], generator=g, device=g.device) for g in generators]
    return torch.stack(rows).to(like.device, non_blocking=True)

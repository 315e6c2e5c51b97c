"""What a GPU would do, found out without one: fake tensors of cuda:0 know their device and shape.

An operation that mixes devices raises an error, and the operations that would start a kernel are
counted. Only theta, which decides on the host what is launched, is drawn really.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import degrade
import extractors
import generate


class Launches(TorchDispatchMode):
    """Counts operations that write a tensor on a GPU: kernels and copies to it, but no views.

    `waits` counts copies from or to it for which the program waits. Other ways to wait, such as
    item() or a mask as an index, raise an error, because a fake tensor has no values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in outputs)
        name = func.overloadpacket.__name__
        if on_gpu and not func.is_view and name not in ("empty", "_unsafe_view"):
            self.names[name] += 1
        kinds = {x.device.type for x in (*args, *outputs) if isinstance(x, Tensor)}
        copied = name in ("_to_copy", "copy_") and kinds == {"cpu", "cuda"}
        if copied and not (kwargs or {}).get("non_blocking"):
            self.waits[f"{args[0].device.type} {tuple(args[0].shape)}"] += 1
        return result

    def total(self) -> int:
        return sum(self.names.values())


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                size = storage.nbytes()
                self.alive.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, size)
        return result


@contextlib.contextmanager
def counted_memory() -> Iterator[Memory]:
    """Counts what a training step takes, without computing it: D is left out, which is small.

    Tensors are fake ones of a CPU, because autograd asks for the device of others; attention is
    taken as on a GPU, whose fast kernels keep no matrix of all pairs of pixels.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] > extractors.WIDEST_HEAD:
            return extractors.attention_by_products(q, k, v)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    def reduced(hr: Tensor, theta: object, generator: object = None) -> Tensor:
        return hr.new_zeros(len(hr), 3, hr.shape[2] // 4, hr.shape[3] // 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        patch.setattr(degrade, "degrade", reduced)
        draw_theta_really(patch)
        memory = Memory()
        with FakeTensorMode(allow_non_fake_inputs=True), memory:
            yield memory


def training_memory(net: nn.Module, trained: list[nn.Parameter], loss) -> float:
    """GiB of a step: weights, their average, two moments, gradients and all that backward needs.

    To be called within counted_memory, in which the network must have been made.
    """
    net.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    kept = [torch.zeros_like(p) for p in trained for _ in range(2)]
    kept += [value.detach().clone() for value in net.state_dict().values()]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss()["loss"]
    value.backward()
    assert len(kept) > 0
    return next(m for m in _get_current_dispatch_mode_stack() if isinstance(m, Memory)).peak / 2**30


def indexed(x: Tensor, key: object) -> tuple[Tensor, list[Tensor | None]]:
    """The view of x that the slices, numbers and None in a key make, and the tensors in it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(k is Ellipsis for k in keys):
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        used = sum(k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (x.ndim - used)
    dim, tensors = 0, []
    for k in keys:
        if isinstance(k, int):
            x = x.select(dim, k)
            continue
        if k is None:
            x = x.unsqueeze(dim)
        elif isinstance(k, slice) and k != slice(None):
            x = torch.ops.aten.slice(x, dim, k.start, k.stop, k.step or 1)
        is_index = isinstance(k, Tensor | list)
        tensors.append(torch.as_tensor(k).to(x.device) if is_index else None)
        dim += 1
    return x, tensors if any(t is not None for t in tensors) else []


def getitem(x: Tensor, key: object) -> Tensor:
    if x.device.type != "cuda":
        return real_getitem(x, key)
    view, tensors = indexed(x, key)
    return torch.ops.aten.index(view, tensors) if tensors else view


def setitem(x: Tensor, key: object, value: object) -> None:
    if x.device.type != "cuda":
        return real_setitem(x, key, value)
    view, tensors = indexed(x, key)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    if tensors:
        torch.ops.aten.index_put_(view, tensors, value)
    else:
        copy_(view, value)


def copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if x.device.type != "cuda":
        return real_copy_(x, source, non_blocking)
    return x.mul_(0).add_(source.to(x.device, non_blocking=non_blocking))


def contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if x.device.type != "cuda":
        return real_contiguous(x, memory_format=memory_format)
    if x.is_contiguous(memory_format=memory_format):
        return x
    return x.clone(memory_format=memory_format)


real_copy_, real_contiguous = Tensor.copy_, Tensor.contiguous
real_getitem, real_setitem = Tensor.__getitem__, Tensor.__setitem__


def really(function):
    """The function with real tensors: parameters theta decide on the host what is launched."""

    def called(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


def draw_theta_really(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(extractors, "sample_mixed", really(extractors.sample_mixed))
    patch.setattr(degrade, "sample_degradation", really(degrade.sample_degradation))
    patch.setattr(degrade.Degradation, "cat", staticmethod(really(degrade.Degradation.cat)))


@contextlib.contextmanager
def fake_cuda() -> Iterator[Launches]:
    """Tensors made inside are fake, and may be of cuda:0; generators stay on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degrade, "generator_on", lambda device, source: source)
        on_cpu = generate.make_generator
        patch.setattr(generate, "make_generator", lambda *key, device="cpu": on_cpu(*key))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        # In C++ these ask for a device of that kind, even if the tensor is fake.
        stand_ins = {
            "__getitem__": getitem,
            "__setitem__": setitem,
            "__invert__": lambda x: torch.bitwise_not(x),
            "copy_": copy_,
            "contiguous": contiguous,
        }
        for name, function in stand_ins.items():
            patch.setattr(Tensor, name, function)
        draw_theta_really(patch)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, Launches() as launches:
            yield launches

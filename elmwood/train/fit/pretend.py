"""A pretended GPU: tensors with shapes and a device but no storage, on a machine that has none. A step of training on it shows what it
would allocate on CUDA, and fails where tensors of two devices meet.

torch's own parts are used: FakeTensorMode, on "cuda" where there is one. Elsewhere a build without CUDA knows no such device, and the type
that is left to backends written in Python (torch.utils) stands in for it, under the name "pretend": the operators that autocast casts for
CUDA are cast here, and attention takes the fused kernel that CUDA would take.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elmwood.train.fit.allocator import CachingAllocator

DEVICE = "pretend"
# operators that autocast runs in the narrow dtype, and in float32, on CUDA (aten/src/ATen/autocast_mode.h): those that models here use
NARROW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d")
WIDE = ("layer_norm", "softmax.int", "log_softmax.int", "nll_loss", "cross_entropy_loss", "pow.Tensor_Scalar", "rsqrt", "sum", "exp", "log")


@contextmanager
def pretend(allocator: CachingAllocator | None = None) -> Iterator[torch.device]:
    """Inside, tensors are made without storage; those on the device that is yielded are counted by the allocator."""
    real = torch.cuda.is_available()
    if not real:
        _register()
    device = torch.device("cuda" if real else DEVICE, 0)
    only_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) starts on the CPU, where it can be made
    try:
        with FakeTensorMode(), _Counted(allocator or CachingAllocator(), device.type):
            yield device
    finally:
        torch._C._set_only_lift_cpu_tensors(only_cpu)


def place(model: nn.Module, device: torch.device) -> None:
    """Give the tensors of a model made on the meta device fake ones of a device, in place; inside `pretend`. Shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device), weight.requires_grad)
                module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


class _Counted(TorchDispatchMode):
    """Tells an allocator of every storage on the pretended device, when it is made and when nothing refers to it any more."""

    def __init__(self, allocator: CachingAllocator, kind: str):
        super().__init__()
        self.allocator, self.kind, self.blocks = allocator, kind, dict[int, int]()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operator(*arguments, **(named or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.device.type == self.kind:
                storage = one.untyped_storage()
                if storage._cdata not in self.blocks and storage.nbytes():
                    self.blocks[storage._cdata] = self.allocator.allocate(storage.nbytes())
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.allocator.free(self.blocks.pop(key))


# ---- the device: registered once in a process ----------------------------------------------------------------------


@cache
def _register() -> tuple[torch.library.Library, ...]:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    every, aten = (torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, narrow in ((NARROW, True), (WIDE, False)):
        for name in names:
            operator, _, overload = name.partition(".")
            packet = getattr(torch.ops.aten, operator)
            aten.impl(name, _cast(getattr(packet, overload) if overload else packet, narrow), "AutocastPrivateUse1")
    aten.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    aten.impl("scaled_dot_product_attention", _cast(nn.functional.scaled_dot_product_attention, True), "AutocastPrivateUse1")
    return every, aten


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device's module: here there is no chance and one device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None: ...

    def manual_seed_all(self, *_: Any) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


def _cast(operator: Callable[..., Any], narrow: bool) -> Callable[..., Any]:
    """The operator, its floating-point tensors cast as autocast would."""

    def run(*arguments: Any, **named: Any) -> Any:
        dtype = torch.get_autocast_dtype(DEVICE) if narrow else torch.float32

        def cast(one: Any) -> Any:
            return one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() and one.device.type == DEVICE else one

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_autocast())):
            return operator(*map(cast, arguments), **{name: cast(one) for name, one in named.items()})

    return run


def _autocast() -> Any:
    return getattr(torch._C.DispatchKey, "AutocastPrivateUse1")  # noqa: B009  # torch's stubs do not list it


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The memory-efficient kernel, which takes any mask: nothing is kept of the scores but a number for each row."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

"""A layer's few tokens in inference: router and experts in one compiled call."""

import weakref
from collections.abc import Callable
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from turnout.contracts import CapacityPolicy, Dispatcher, FewCall, FusedBackend, Router
from turnout.dispatch import Dropless, LocalDispatcher
from turnout.experts import choose_backend
from turnout.experts.called import are_all_watched, is_called, is_watched
from turnout.kernels.arguments import FEW_ROWS
from turnout.routers.pieces import MOST_ARGMAX_PASSES
from turnout.tensors import Admission, RouterOutput, is_traced, is_transformed

DTYPES = (torch.float32, torch.bfloat16)


class FewTokens:
    """How a layer computes a few tokens, found with the first of them and kept for as long as the layer is what it was.

    The weights of a few experts are read in a millisecond, and push the code of whatever else there is out of the
    caches: thirty operators around them took .6 ms, and finding the one call for all of them .4.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __reduce__(self) -> "tuple[type[FewTokens], tuple[()]]":
        # a copied layer has weights of its own
        return FewTokens, ()

    def run(
        self,
        x: Tensor,
        *,
        router: nn.Module,
        experts: nn.Module,
        backend: str,
        capacity: CapacityPolicy,
        dispatcher: Dispatcher,
    ) -> tuple[Tensor, Callable[[], RouterOutput]] | None:
        """y, and what says how the tokens were routed; None where this is not for them: they take the long way then.

        Shapes: x (..., D), without padding; y likewise.
        """
        if torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1] or is_traced(x):
            # no expert has more rows than there are tokens
            return None
        if not _is_plain(x) or is_transformed():
            return None
        kept, layer = self._kept, (router, experts, backend, capacity, dispatcher)
        # alive during the call, whatever other threads do
        reads = None if kept is None else kept.reads(x, layer)
        if kept is not None and reads is not None:
            return kept.call(x)
        call = _found(x, *layer)
        self._kept = None if call is None else _kept(call, x, layer)
        return None if call is None else call(x)


def _kept(call: FewCall, x: Tensor, layer: tuple[object, ...]) -> "_Kept | None":
    """The call, where what it reads is the layer's own: a copy, in another dtype, does not see its weight change."""
    parts = [part for part in layer if isinstance(part, nn.Module)]
    own = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
    modules = [module for part in parts for module in part.modules()]
    # what a parametrization makes may be the weight itself today
    if not own.issuperset(map(id, call.reads)) or any(map(is_parametrized, modules)):
        return None
    return _Kept(call, x, layer, modules)


class _Kept:
    """A call, and what it was found for. It keeps neither modules nor weights alive that the layer no longer has."""

    def __init__(self, call: FewCall, x: Tensor, layer: tuple[object, ...], modules: list[nn.Module]) -> None:
        self.call = call
        self._dtype, self._dim = x.dtype, x.shape[-1]
        self._layer = [weakref.ref(part) if isinstance(part, nn.Module) else partial(_same, part) for part in layer]
        self._tensors = [(weakref.ref(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in call.reads]
        call.reads = ()
        self._modules = [(weakref.ref(module), names := _dicts(module), _ids(module, names)) for module in modules]
        # no two things that live have one id
        values = [value for module in modules for held in _contents(module, _dicts(module)) for value in held.values()]
        self._weak = [weakref.ref(value) for value in values if isinstance(value, Tensor | nn.Module)]
        self._own = [value for value in values if not isinstance(value, Tensor | nn.Module | dict)]

    def reads(self, x: Tensor, layer: tuple[object, ...]) -> list[Tensor] | None:
        """What the call reads, where these are such tokens, and that layer has the parts, weights and hooks it had."""
        if x.dtype is not self._dtype or x.shape[-1] != self._dim or are_all_watched():
            return None
        if any(part is not known() for part, known in zip(layer, self._layer, strict=True)):
            return None
        for known, names, ids in self._modules:
            module = known()
            if module is None or _ids(module, names) != ids:
                return None
        if any(known() is None for known in self._weak):
            return None
        found: list[Tensor] = []
        for known, at, dtype, shape in self._tensors:
            tensor = known()
            # whatever was done to `.data`
            if tensor is None or tensor.data_ptr() != at or tensor.dtype is not dtype or tensor.shape != shape:
                return None
            if not tensor.is_contiguous():
                return None
            found.append(tensor)
        return found


def _same(part: object) -> object:
    return part


def _dicts(module: nn.Module) -> tuple[str, ...]:
    """Attributes that hold others: parameters, hooks."""
    return tuple(name for name, value in vars(module).items() if isinstance(value, dict))


def _contents(module: nn.Module, names: tuple[str, ...]) -> list[dict[Any, Any]]:
    own = vars(module)
    return [own, *(own.get(name, own) for name in names)]


def _ids(module: nn.Module, names: tuple[str, ...]) -> list[int]:
    """Of everything that the module has, and of its dictionaries."""
    return [id(value) for held in _contents(module, names) for value in held.values()]


def _found(
    x: Tensor,
    router: nn.Module,
    experts: nn.Module,
    backend: str,
    capacity: CapacityPolicy,
    dispatcher: Dispatcher,
) -> FewCall | None:
    """What computes such tokens, where nothing of what the long way does would be left out by it."""
    if type(capacity) is not Dropless or type(dispatcher) is not LocalDispatcher:
        return None
    choice = router.softmax_choice() if isinstance(router, Router) else None
    if choice is None or choice.k > MOST_ARGMAX_PASSES or is_called(experts) or are_all_watched():
        return None
    if any(map(is_watched, router.modules())):
        return None
    weight_ED, bias_E = choice.weight_ED, choice.bias_E
    # FSDP and others take memory away by resizing the storage
    if any(not _is_read(tensor) or tensor.data_ptr() == 0 for tensor in (weight_ED, bias_E) if tensor is not None):
        return None
    if weight_ED.shape != (experts.num_experts, x.shape[-1]) or (
        bias_E is not None and bias_E.shape != weight_ED.shape[:1]
    ):
        return None
    chosen = choose_backend(experts, backend, dtype=x.dtype, device=x.device)
    return chosen.few_call(experts, choice, dtype=x.dtype) if isinstance(chosen, FusedBackend) else None


class Admitted:
    """What such a call returns of its routing, admitted; both put together when first asked for."""

    def __init__(self, route: Callable[[], RouterOutput], capacity: CapacityPolicy) -> None:
        self._route, self._capacity = route, capacity

    def __call__(self) -> tuple[RouterOutput, Admission]:
        return self._both

    @cached_property
    def _both(self) -> tuple[RouterOutput, Admission]:
        routing = self._route()
        return routing, self._capacity.admit(routing.assignment)


def _is_plain(x: Tensor) -> bool:
    """Whether its numbers can be read where they lie, and are what is to be computed with."""
    return _is_read(x) and x.numel() > 0 and not x.is_neg() and not torch.is_autocast_enabled("cpu")


def _is_read(tensor: Tensor) -> bool:
    """Whether the kernel can: a subclass may have its numbers anywhere."""
    is_own = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return is_own and tensor.is_cpu and tensor.dtype in DTYPES and tensor.is_contiguous()

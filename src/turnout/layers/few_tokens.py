"""A layer's few tokens in inference: router and experts in one compiled call."""

from collections.abc import Callable
from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from turnout.contracts import CapacityPolicy, Dispatcher, FewCall, FusedBackend, Router
from turnout.dispatch import Dropless, LocalDispatcher
from turnout.experts import choose_backend
from turnout.experts.called import are_all_watched, hooks_of_all, is_called, is_watched
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
        if kept is None or not kept.holds(x, layer):
            call = _found(x, *layer)
            if call is None:
                return None
            kept = self._kept = _Kept(call, x, layer)
        return kept.call(x)


class _Kept:
    """A call, and what it was found for."""

    def __init__(self, call: FewCall, x: Tensor, layer: tuple[object, ...]) -> None:
        self.call = call
        self._dtype, self._dim, self._layer = x.dtype, x.shape[-1], layer
        self._reads = [(tensor, tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in call.reads]
        parts = [part for part in layer if isinstance(part, nn.Module)]
        own = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
        # a copy, in another dtype, does not see its weight change
        self._is_copy = not own.issuperset(map(id, call.reads))
        held: list[dict[Any, Any]] = [vars(module) for part in parts for module in part.modules()]
        held += [value for attributes in held for value in attributes.values() if isinstance(value, dict)]
        held += hooks_of_all()
        self._empty = [each for each in held if not each]
        self._filled = [(each, tuple(each.values())) for each in held if each]

    def holds(self, x: Tensor, layer: tuple[object, ...]) -> bool:
        """Whether these are such tokens, and that layer: the same parts, settings, weights and hooks."""
        if self._is_copy or x.dtype is not self._dtype or x.shape[-1] != self._dim:
            return False
        # most dictionaries of a module hold hooks, of which there are none
        if not all(map(is_, self._layer, layer)) or any(self._empty):
            return False
        for held, values in self._filled:
            if len(held) != len(values) or not all(map(is_, held.values(), values)):
                return False
        # and whatever was done to a weight's `.data`
        for tensor, at, dtype, shape in self._reads:
            if tensor.data_ptr() != at or tensor.dtype is not dtype or tensor.shape != shape:
                return False
            if not tensor.is_contiguous():
                return False
        return True


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
    if not _is_read(weight_ED) or not (bias_E is None or _is_read(bias_E)):
        return None
    if weight_ED.shape[0] != experts.num_experts or weight_ED.shape[1] != x.shape[-1]:
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

"""A layer's few tokens in inference: router and experts in one compiled call."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from turnout.contracts import CapacityPolicy, Dispatcher, FusedBackend, Router
from turnout.dispatch import Dropless, LocalDispatcher
from turnout.experts import choose_backend
from turnout.experts.called import are_all_watched, is_called, is_watched
from turnout.kernels.arguments import FEW_ROWS
from turnout.routers.pieces import MOST_ARGMAX_PASSES
from turnout.tensors import Admission, RouterOutput

DTYPES = (torch.float32, torch.bfloat16)


def run_few(
    x: Tensor,
    *,
    router: nn.Module,
    experts: nn.Module,
    backend: str,
    capacity: CapacityPolicy,
    dispatcher: Dispatcher,
) -> tuple[Tensor, Callable[[], RouterOutput]] | None:
    """y, and what says how the tokens were routed; None where this is not for them: they take the long way then.

    The weights of a few experts are read in a millisecond, and push the code of whatever else there is out of the
    caches: thirty operators around them took .6 ms.
    Shapes: x (..., D), without padding; y likewise.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1]:
        # no expert has more rows than there are tokens
        return None
    if type(capacity) is not Dropless or type(dispatcher) is not LocalDispatcher or not _is_plain(x):
        return None
    choice = router.softmax_choice() if isinstance(router, Router) else None
    if choice is None or choice.k > MOST_ARGMAX_PASSES or is_called(experts) or are_all_watched():
        return None
    if any(module is not None and is_watched(module) for module in (router, *router._modules.values())):  # pyright: ignore[reportPrivateUsage]
        return None
    weight_ED, bias_E = choice.weight_ED, choice.bias_E
    if not _is_read(weight_ED) or not (bias_E is None or _is_read(bias_E)):
        return None
    if weight_ED.shape[0] != experts.num_experts or weight_ED.shape[1] != x.shape[-1]:
        return None
    chosen = choose_backend(experts, backend, dtype=x.dtype, device=x.device)
    return chosen.run_few(experts, x, choice) if isinstance(chosen, FusedBackend) else None


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

"""Experts whose rows a backend computes in a call of the module; and whether somebody wants such calls to be made."""

from collections.abc import Callable
from typing import Any, Self

import torch.nn.modules.module as every  # pyright: ignore[reportPrivateUsage]
from torch import Tensor, nn

from turnout.contracts import ExpertBackend
from turnout.kernels.pages import copied_to_large_pages
from turnout.tensors import Padded, Ragged


class CalledExperts(nn.Module):
    """E experts of one kind, whose weights are what a backend reads."""

    def forward(self, x: Tensor, counts_L: Tensor | None = None, backend: ExpertBackend | None = None) -> Tensor:
        """What a backend makes of rows; a call of the module, for its hooks may have to bring the weights first.

        Shapes: x (M, D) expert by expert, or (L, C, D) in blocks; counts_L (L,); returns the shape of x.
        """
        if backend is None or counts_L is None:
            raise NotImplementedError("experts are computed by a backend: turnout.experts.choose_backend(experts, ...)")
        if x.ndim == 3:
            return backend.run(self, Padded(x_LCD=x, counts_L=counts_L)).x
        return backend.run(self, Ragged(x_MD=x, counts_L=counts_L)).x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What a cast or a move makes anew lies on large pages, as what it was made of did."""

        def applied(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made is tensor else copied_to_large_pages(made)

        return super()._apply(applied, recurse)


# asked in every call of a few tokens: no loops
def is_watched(module: nn.Module) -> bool:
    """Whether somebody asked to be told what goes through a module, or to change it: hooks, or a method replaced."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or "route" in own
    )


def are_all_watched() -> bool:
    """The same of every module there is."""
    return any(hooks_of_all())


def hooks_of_all() -> tuple[dict[int, Any], ...]:
    """Those of every module there is, as they stand in torch's own tables."""
    return (
        every._global_forward_hooks,
        every._global_forward_pre_hooks,
        every._global_backward_hooks,
        every._global_backward_pre_hooks,
    )


def is_called(experts: nn.Module) -> bool:
    """Whether a pass over tokens would leave out what a call of these experts does beside."""
    if not isinstance(experts, CalledExperts):
        return False
    is_own = type(experts).forward is CalledExperts.forward
    return not is_own or is_watched(experts) or are_all_watched()

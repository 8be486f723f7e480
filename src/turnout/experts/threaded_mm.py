"""Experts side by side: each worker thread computes one expert after another, on one core, in memory it writes once.

Two cores that share one small product wait for each other at every step of it; with an expert each they do not.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from queue import Empty, SimpleQueue
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, Refusal
from turnout.experts.activations import Differentiated
from turnout.experts.weights import FFNExperts
from turnout.tensors import Ragged, Rows, first_order

# before the activation, of the experts that a thread computes together: a MiB in float32 is still near it afterwards,
# and many small experts are few calls of torch
VALUES_TOGETHER = 1 << 18
SHARES_A_THREAD = 4  # at least, where there are as many experts: the last to end must not be far behind
# MKL multiplies the columns of few rows by so many others without copying them first: 1.2 times as fast for a gradient
# of once to twice 2^17 values (256 x 512), slower for smaller and larger ones
NARROW, MOST_ROWS_NARROWED, VALUES_NARROWED = 128, 256, 1 << 17


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Consecutive experts that one thread computes together, and their rows."""

    experts: slice
    rows: slice
    counts: list[int]

    def of(self, rows_MD: Tensor) -> tuple[Tensor, ...]:
        """The rows of each of the experts, of all those of the share."""
        return rows_MD.split(self.counts)


class _ThreadedFFN(torch.autograd.Function):
    """Saves its inputs and the values before the activation; writes each expert's gradients in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        up_EDG: Tensor,
        down_EFD: Tensor,
        up_bias_EG: Tensor | None,
        down_bias_ED: Tensor | None,
        counts: list[int],
        activation: Callable[[Tensor], Tensor],
        keep: bool,
    ) -> Tensor:
        width = up_EDG.shape[2]
        up_MG = x_MD.new_empty(len(x_MD), width) if keep else None
        y_MD = _contiguous(x_MD)
        shares = _shares(counts, width)

        def compute(share: _Share) -> None:
            x = x_MD[share.rows]
            up = x.new_empty(len(x), width) if up_MG is None else up_MG[share.rows]
            _products(share, x, up_EDG, up_bias_EG, out=up)
            _products(share, activation(up), down_EFD, down_bias_ED, out=y_MD[share.rows])

        _side_by_side(compute, [share for share in shares if any(share.counts)])
        if keep:
            ctx.save_for_backward(x_MD, up_EDG, down_EFD, up_bias_EG, down_bias_ED, up_MG)
            ctx.shares, ctx.activation = shares, activation
        return y_MD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, up_MG = ctx.saved_tensors
        x_MD, up_EDG, down_EFD, _, _ = inputs
        y_grad_MD = grads[0].contiguous()
        found = [
            _contiguous(value) if wanted else None for value, wanted in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        x_grad_MD, up_grad_EDG, down_grad_EFD, up_bias_grad_EG, down_bias_grad_ED = found

        def compute(share: _Share) -> None:
            x, up, y_grad = x_MD[share.rows], up_MG[share.rows], y_grad_MD[share.rows]
            h_grad = up.new_empty(len(up), down_EFD.shape[1])
            _products(share, y_grad, down_EFD.mT, None, out=h_grad)
            h, up_grad = _through_activation(ctx.activation, up, h_grad)
            _weight_gradients(share, h, y_grad, out=down_grad_EFD)
            _weight_gradients(share, x, up_grad, out=up_grad_EDG)
            _sums(share, up_grad, out=up_bias_grad_EG)
            _sums(share, y_grad, out=down_bias_grad_ED)
            if x_grad_MD is not None:
                _products(share, up_grad, up_EDG.mT, None, out=x_grad_MD[share.rows])

        _side_by_side(compute, ctx.shares)
        return (*found, None, None, None)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _shares(counts: Sequence[int], width: int) -> list[_Share]:
    """All experts in their order: one, or several with few rows."""
    starts, ends = [0], list(accumulate(counts, initial=0))
    most_rows = min(VALUES_TOGETHER // width, ends[-1] // (SHARES_A_THREAD * torch.get_num_threads()))
    for e in range(1, len(counts)):
        if ends[e + 1] - ends[starts[-1]] > most_rows:
            starts.append(e)
    return [
        _Share(experts=slice(start, stop), rows=slice(ends[start], ends[stop]), counts=list(counts[start:stop]))
        for start, stop in pairwise([*starts, len(counts)])
    ]


def _products(share: _Share, rows: Tensor, weight_EDG: Tensor, bias_EG: Tensor | None, *, out: Tensor) -> None:
    weights = weight_EDG[share.experts].unbind()
    biases = repeat(None) if bias_EG is None else bias_EG[share.experts].unbind()
    for own, weight, bias, into in zip(share.of(rows), weights, biases, share.of(out), strict=False):
        if bias is None:
            torch.mm(own, weight, out=into)
        else:
            torch.addmm(bias, own, weight, out=into)


def _weight_gradients(share: _Share, left: Tensor, right: Tensor, *, out: Tensor | None) -> None:
    if out is None:
        return
    is_middling = VALUES_NARROWED <= out[0].numel() < 2 * VALUES_NARROWED
    for own, grad, into in zip(share.of(left), share.of(right), out[share.experts].unbind(), strict=True):
        columns = NARROW if is_middling and len(own) <= MOST_ROWS_NARROWED else out.shape[2]
        for some, place in zip(grad.split(columns, dim=1), into.split(columns, dim=1), strict=True):
            torch.mm(own.t(), some, out=place)


def _sums(share: _Share, rows: Tensor, *, out: Tensor | None) -> None:
    if out is None:
        return
    for own, into in zip(share.of(rows), out[share.experts].unbind(), strict=True):
        torch.sum(own, dim=0, out=into)


def _through_activation(
    activation: Callable[[Tensor], Tensor], up_MG: Tensor, h_grad_MF: Tensor
) -> tuple[Tensor, Tensor]:
    """The activation once more, and the gradient before it."""
    if isinstance(activation, Differentiated):
        return activation.backward(up_MG, h_grad_MF)
    with torch.enable_grad():
        leaf = up_MG.detach().requires_grad_()
        h_MF = activation(leaf)
    (up_grad_MG,) = torch.autograd.grad(h_MF, leaf, h_grad_MF)
    return h_MF.detach(), up_grad_MG


def _side_by_side(compute: Callable[[_Share], None], shares: Sequence[_Share]) -> None:
    """Every share, the fullest first, on as many threads as torch has."""
    order = sorted(shares, key=lambda share: share.rows.start - share.rows.stop)
    num_workers = min(torch.get_num_threads(), len(order))
    if num_workers < 2:
        for share in order:
            compute(share)
        return
    queue: SimpleQueue[_Share] = SimpleQueue()
    for share in order:
        queue.put(share)
    workers = _workers(torch.get_num_threads())
    for done in [workers.submit(_drain, queue, compute) for _ in range(num_workers)]:
        done.result()


# gradients and autocast are settings of a thread: a new one has neither switched off
@torch.no_grad()
def _drain(queue: "SimpleQueue[_Share]", compute: Callable[[_Share], None]) -> None:
    while True:
        try:
            share = queue.get_nowait()
        except Empty:
            return
        compute(share)


@functools.cache
def _workers(num_workers: int) -> ThreadPoolExecutor:
    """Threads that each compute on one core."""
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="turnout-experts")
    all_there = Barrier(num_workers)

    def settle() -> None:
        torch.set_num_threads(1)
        all_there.wait()

    for done in [pool.submit(settle) for _ in range(num_workers)]:
        done.result()
    # what a worker sets is also what new threads begin with
    torch.set_num_threads(num_workers)
    return pool


if hasattr(os, "register_at_fork"):
    # threads do not follow into a forked process
    os.register_at_fork(after_in_child=_workers.cache_clear)


class ThreadedMM(ExpertBackend):
    """Plain torch, without a compiler; float32 on the CPU."""

    layout = "ragged"

    def refusal(self, experts: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Refusal | None:
        if not isinstance(experts, FFNExperts):
            return Refusal(reason="threaded_mm computes feed-forward experts; modules of your own need backend='loop'")
        if device.type != "cpu":
            return Refusal(reason=f"threaded_mm computes on the CPU, not on {device.type}; use backend='padded_bmm'")
        if dtype != torch.float32 or experts.up_EDG.dtype != dtype:
            return Refusal(reason=f"threaded_mm computes float32, not {dtype}; use backend='padded_bmm'")
        if torch.compiler.is_compiling():
            return Refusal(reason="torch.compile does not know threaded_mm; use backend='padded_bmm'")
        return None

    def run(self, experts: nn.Module, rows: Rows) -> Rows:
        assert isinstance(rows, Ragged)
        assert isinstance(experts, FFNExperts)
        inputs = (rows.x_MD, experts.up_EDG, experts.down_EFD, experts.up_bias_EG, experts.added_bias_ED)
        keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        y_MD = _ThreadedFFN.apply(*inputs, rows.counts_L.tolist(), experts.activation, keep)
        return Ragged(x_MD=y_MD, counts_L=rows.counts_L)


ExpertBackend.TABLE.register("threaded_mm")(ThreadedMM())

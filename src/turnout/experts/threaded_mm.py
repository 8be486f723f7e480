"""Experts side by side: each worker thread computes one expert after another, on one core, in memory it writes once.

Two cores that share one small product wait for each other at every step of it; with an expert each they do not.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from turnout.contracts import ExpertBackend, Refusal
from turnout.experts.activations import Activation
from turnout.experts.weights import FFNExperts
from turnout.tensors import Ragged, Rows, first_order


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
        activation: Activation,
        keep: bool,
    ) -> Tensor:
        width = up_EDG.shape[2]
        up_MG = x_MD.new_empty(len(x_MD), width) if keep else None
        y_MD = torch.empty_like(x_MD, memory_format=torch.contiguous_format)
        xs, ys = x_MD.split(counts), y_MD.split(counts)
        ups = None if up_MG is None else up_MG.split(counts)

        def compute(e: int) -> None:
            if not counts[e]:
                return
            up = xs[e].new_empty(counts[e], width) if ups is None else ups[e]
            _product(xs[e], up_EDG[e], None if up_bias_EG is None else up_bias_EG[e], out=up)
            _product(activation(up), down_EFD[e], None if down_bias_ED is None else down_bias_ED[e], out=ys[e])

        _side_by_side(compute, counts)
        if keep:
            ctx.save_for_backward(x_MD, up_EDG, down_EFD, up_bias_EG, down_bias_ED, up_MG)
            ctx.counts, ctx.activation = counts, activation
        return y_MD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, up_EDG, down_EFD, up_bias_EG, down_bias_ED, up_MG = ctx.saved_tensors
        y_grad_MD = grads[0].contiguous()
        inputs = (x_MD, up_EDG, down_EFD, up_bias_EG, down_bias_ED)
        found = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else None
            for tensor, wanted in zip(inputs, ctx.needs_input_grad[:5], strict=True)
        ]
        x_grad, *weight_grads = found
        parts = [tensor.split(ctx.counts) for tensor in (x_MD, up_MG, y_grad_MD)]
        x_grads = None if x_grad is None else x_grad.split(ctx.counts)

        def compute(e: int) -> None:
            x, up, y_grad = (part[e] for part in parts)
            own = [None if grad is None else grad[e] for grad in weight_grads]
            h, up_grad = _through_activation(ctx.activation, up, y_grad @ down_EFD[e].t())
            for out, left, right in ((own[0], x, up_grad), (own[1], h, y_grad)):
                if out is not None:
                    torch.mm(left.t(), right, out=out)
            for out, rows in ((own[2], up_grad), (own[3], y_grad)):
                if out is not None:
                    torch.sum(rows, dim=0, out=out)
            if x_grads is not None:
                torch.mm(up_grad, up_EDG[e].t(), out=x_grads[e])

        _side_by_side(compute, ctx.counts)
        return (*found, None, None, None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _through_activation(activation: Activation, up_MG: Tensor, h_grad_MF: Tensor) -> tuple[Tensor, Tensor]:
    """The activation once more, and the gradient before it."""
    with torch.enable_grad():
        leaf = up_MG.detach().requires_grad_()
        h_MF = activation(leaf)
    (up_grad_MG,) = torch.autograd.grad(h_MF, leaf, h_grad_MF)
    return h_MF.detach(), up_grad_MG


def _side_by_side(compute: Callable[[int], None], counts: Sequence[int]) -> None:
    """Every expert, the fullest first, on as many threads as torch has."""
    order = sorted(range(len(counts)), key=lambda e: -counts[e])
    num_workers = min(torch.get_num_threads(), len(order))
    if num_workers < 2:
        for e in order:
            compute(e)
        return
    queue: SimpleQueue[int] = SimpleQueue()
    for e in order:
        queue.put(e)
    workers = _workers(torch.get_num_threads())
    for done in [workers.submit(_drain, queue, compute) for _ in range(num_workers)]:
        done.result()


# gradients and autocast are settings of a thread: a new one has neither switched off
@torch.no_grad()
def _drain(queue: "SimpleQueue[int]", compute: Callable[[int], None]) -> None:
    while True:
        try:
            e = queue.get_nowait()
        except Empty:
            return
        compute(e)


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

"""The compiled functions that choose experts, called on tensors."""

import ctypes
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from turnout.kernels.arguments import Chosen, at, check, room


class GateKernel:
    """The best of each row, and softmax with them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._best = library.turnout_best
        self._best.argtypes = [pointer, number, number, number, pointer, number, pointer]
        self._choose, self._choose_backward = library.turnout_choose, library.turnout_choose_backward
        for function in (self._choose, self._choose_backward):
            function.argtypes, function.restype = [pointer], ctypes.c_int
        self._pool = _torch_pool()

    def best(self, scores_RE: Tensor, k: int) -> Tensor:
        """Experts of the k highest scores, best first, of equals the lower index; float32 in, (R, k) int64 out."""
        scores_RE = scores_RE.detach().contiguous()
        num_rows, num_experts = scores_RE.shape
        expert_RK = room(num_rows, k, dtype=torch.int64)
        threads, pool = torch.get_num_threads(), self._pool
        check(self._best(scores_RE.data_ptr(), num_rows, num_experts, k, expert_RK.data_ptr(), threads, pool))
        return expert_RK

    def choose(self, logits_RE: Tensor, token_R: Tensor, k: int, *, renormalize: bool) -> Chosen:
        """The k best experts of each row, as `best` has them, with softmax scores; their weights are those scores, or
        where they are to be renormalised the softmax of their own logits.
        """
        num_rows, num = len(logits_RE), len(logits_RE) * k
        number = partial(room, num, dtype=torch.int64)
        # small ones first: what lies above large ones keeps the allocator from giving those back
        expert_N, token_N, choice_N, weight_N = number(), number(), number(), room(num, dtype=torch.float32)
        scores_RE = room(*logits_RE.shape, dtype=torch.float32)
        chosen = Chosen(scores_RE, weight_N, expert_N, token_N, choice_N)
        self._gates(self._choose, chosen, num_rows, renormalize, logits_RE.contiguous(), token_R.contiguous())
        return chosen

    def choose_backward(
        self, chosen: Chosen, d_scores_RE: Tensor | None, d_weight_N: Tensor | None, *, renormalize: bool
    ) -> Tensor:
        """The gradient of the logits; None: nothing depends on it."""
        d_logits_RE = torch.empty_like(chosen.scores_RE)
        given = [None if grad is None else grad.contiguous() for grad in (d_scores_RE, d_weight_N)]
        rest = (None, None, *given, d_logits_RE)
        self._gates(self._choose_backward, chosen, len(d_logits_RE), renormalize, *rest)
        return d_logits_RE

    def _gates(
        self,
        function: Callable[[int], int],
        chosen: Chosen,
        num_rows: int,
        renormalize: bool,
        logits_RE: Tensor | None,
        token_R: Tensor | None,
        *gradients: Tensor | None,
    ) -> None:
        """`Gates` of gates.h, of which a forward pass reads no gradients."""
        num_experts, k = chosen.scores_RE.shape[1], len(chosen.expert_N) // max(num_rows, 1)
        numbers = (num_rows, num_experts, k, renormalize, torch.get_num_threads(), self._pool)
        tensors = (logits_RE, token_R, *chosen, *gradients)
        gates = array("q", (*numbers, *map(at, tensors)))
        gates.extend([0] * (NUM_GATES - len(gates)))
        check(function(gates.buffer_info()[0]))


NUM_GATES = 16  # fields of `Gates` in gates.h


def _torch_pool() -> int:
    """Address of GOMP_parallel in the OpenMP library torch computes with, or 0: a second pool would fight the first."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0

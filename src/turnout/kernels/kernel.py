"""The compiled functions, called on tensors."""

import ctypes
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from turnout.errors import ShapeError
from turnout.kernels.arguments import KINDS, Gradients, Int8Weights, Routing, Weights, at, check, check_fit, room
from turnout.kernels.few_call import CompiledFew
from turnout.kernels.gate_kernel import NUM_GATES, GateKernel
from turnout.tensors import Assignment, SoftmaxChoice


class Kernel(GateKernel):
    """What a compiled library can do; it keeps its workspace from call to call."""

    def __init__(self, library: ctypes.CDLL, *, matrix_unit: bool = False) -> None:
        super().__init__(library)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._sort = library.turnout_sort
        self._sort.argtypes, self._sort.restype = [pointer] * 3 + [number] * 3 + [pointer], number
        self._forward, self._backward = library.turnout_forward, library.turnout_backward
        for function in (self._forward, self._backward):
            function.argtypes, function.restype = [pointer], ctypes.c_int
        self._int8 = library.turnout_int8
        self._int8.argtypes, self._int8.restype = [pointer, number], ctypes.c_int
        self.poison = library.turnout_poison
        self._few = library.turnout_few
        self._few.argtypes, self._few.restype = [pointer] * 4 + [number] * 2, ctypes.c_int
        self._library, self.matrix_unit = library, matrix_unit
        self._tile_columns = library.turnout_tile_columns()

    def with_matrix_unit(self) -> "Kernel | str":
        """The same, by the processor's matrix unit where it has a use for it; or why there is none."""
        reason = NO_MATRIX_UNIT[self._library.turnout_ask_matrix_unit()]
        return reason or Kernel(self._library, matrix_unit=True)

    def sort(self, assignment: Assignment, keep_N: Tensor | None) -> Routing:
        """Order the kept assignments by expert.

        Raises: ShapeError if one names an expert or a token that does not exist.
        """
        expert_N, token_N = assignment.expert_N.contiguous(), assignment.token_N.contiguous()
        num_tokens, num_experts, num = assignment.num_tokens, assignment.num_experts, len(expert_N)
        keep_N = None if keep_N is None else keep_N.contiguous()
        routes = room(3 + num_experts + num_tokens + 3 * num, dtype=torch.int32)
        num_rows = self._sort(
            expert_N.data_ptr(), token_N.data_ptr(), at(keep_N), num, num_tokens, num_experts, routes.data_ptr()
        )
        if num_rows < 0:
            raise ShapeError(
                f"the assignment has experts {int(expert_N.min())} to {int(expert_N.max())} and tokens "
                f"{int(token_N.min())} to {int(token_N.max())}; there are {num_experts} experts and {num_tokens} tokens"
            )
        return Routing(
            routes=routes, num_rows=num_rows, num_tokens=num_tokens, num_experts=num_experts, num_assignments=num
        )

    def forward(
        self, x_TD: Tensor, weight_N: Tensor, weights: Weights, routing: Routing, *, saved_rows: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """y_TD, and what the backward pass wants to have back, with room for `saved_rows`; None: nothing is.

        Everything is float32 and contiguous; or tokens and matrices are bfloat16, for the matrix unit, and then what is
        saved and the gradients of both are.
        """
        saved = None if saved_rows is None else x_TD.new_empty(self.saved_size(weights, saved_rows, x_TD.dtype))
        y_TD = room(*x_TD.shape, dtype=x_TD.dtype)
        self._run(self._forward, x_TD, weight_N, weights, routing, (saved, y_TD))
        return y_TD, saved

    def backward(
        self,
        y_grad_TD: Tensor,
        x_TD: Tensor,
        weight_N: Tensor,
        weights: Weights,
        routing: Routing,
        saved: Tensor,
        *,
        wanted: tuple[bool, ...],
        give_back: bool = False,
    ) -> Gradients:
        """Gradients of those inputs that are `wanted`, in the order of Gradients; those of matrices in the dtype of x.

        `give_back`: nobody reads `saved` again, and its memory goes back to the system piece by piece.
        """
        like = (x_TD, weight_N, weights.up_EDG, weights.down_EFD, weights.up_bias_EG, weights.down_bias_ED)
        rows, sums = x_TD.dtype, torch.float32
        dtypes = (rows, sums, rows, rows, sums, sums)
        fresh = [
            torch.empty_like(tensor, dtype=dtype) if tensor is not None and is_wanted else None
            for tensor, is_wanted, dtype in zip(like, wanted, dtypes, strict=True)
        ]
        if fresh[1] is not None:
            # what was dropped has no row to write it
            fresh[1].zero_()
        self._run(
            self._backward, x_TD, weight_N, weights, routing, (saved, None, y_grad_TD, *fresh), give_back=give_back
        )
        return Gradients(*fresh)

    def infer_int8(
        self, x_TD: Tensor, weight_N: Tensor, weights: Int8Weights, routing: Routing, *, digits: int
    ) -> Tensor:
        """y_TD of weights of 8 bits; activations have 7 bits and a sign in one digit, 14 and a sign in two.

        The matrix unit, which takes what has more than a few rows for some expert, has bfloat16 for either.
        """
        y_TD = room(*x_TD.shape, dtype=torch.float32)
        num_experts, dim = routing.num_experts, x_TD.shape[1]
        check_fit(weights, num_experts, dim)
        sizes = (routing.num_tokens, dim, weights.hidden, num_experts, routing.num_assignments)
        own = (*weights.ends, weights.up_bias_EG, weights.down_bias_ED)
        job = self._job((*sizes, KINDS[weights.kind], 0, 0), (routing.routes, x_TD, weight_N, *own, None, y_TD))
        job.extend(map(at, weights.scales))
        check(self._int8(job.buffer_info()[0], digits))
        return y_TD

    def few(
        self, choice: SoftmaxChoice, weights: Weights | Int8Weights, *, dtype: torch.dtype, digits: int = 0
    ) -> CompiledFew:
        """Router and experts of a few tokens of `dtype`, float32 or bfloat16; nothing is dropped.

        `digits` of activations where weights have 8 bits.
        """
        num_experts, dim = choice.weight_ED.shape
        check_fit(weights, num_experts, dim)
        bias_E = None if choice.bias_E is None else choice.bias_E.float()
        fields = array("q", (choice.weight_ED.data_ptr(), at(bias_E), choice.weight_ED.dtype == torch.bfloat16, digits))
        gates = (0, num_experts, choice.k, choice.renormalize, 0, self._pool)
        fields.extend((*gates, *(0,) * (NUM_GATES - len(gates))))
        sizes = (0, dim, weights.hidden, num_experts, 0, KINDS[weights.kind])
        own = (*weights.ends, weights.up_bias_EG, weights.down_bias_ED)
        fields.extend(self._job((*sizes, weights.is_half, dtype == torch.bfloat16), (None, None, None, *own)))
        fields.extend(map(at, weights.scales))
        reads = (choice.weight_ED, bias_E, *own, *weights.scales)
        return CompiledFew(self._few, fields, choice, tuple(tensor for tensor in reads if tensor is not None))

    def saved_size(self, weights: Weights, num_rows: int, dtype: torch.dtype) -> int:
        """Numbers that are kept for the backward pass of so many rows of this dtype."""
        hidden = weights.down_EFD.shape[1]
        parts = weights.up_EDG.shape[2] // hidden
        if dtype == torch.bfloat16:
            return num_rows * -(-hidden * parts // HALF_PANEL) * HALF_PANEL
        panels = -(-hidden // self._tile_columns)
        return num_rows * panels * self._tile_columns * parts

    def _run(
        self,
        function: Callable[[int], int],
        x_TD: Tensor,
        weight_N: Tensor,
        weights: Weights,
        routing: Routing,
        rest: tuple[Tensor | None, ...],
        *,
        give_back: bool = False,
    ) -> None:
        num_experts, dim, hidden = routing.num_experts, x_TD.shape[1], weights.hidden
        check_fit(weights, num_experts, dim)
        sizes = (routing.num_tokens, dim, hidden, num_experts, routing.num_assignments, KINDS[weights.kind])
        own = (*weights.ends, weights.up_bias_EG, weights.down_bias_ED)
        half_rows = x_TD.dtype == torch.bfloat16
        job = self._job((*sizes, weights.is_half, half_rows), (routing.routes, x_TD, weight_N, *own, *rest))
        job[-1] = give_back
        check(function(job.buffer_info()[0]))

    def _job(self, numbers: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> "array[int]":
        """`Job` of job.h; the fields that no tensor is given for are null."""
        own = (torch.get_num_threads(), self.matrix_unit, self._pool)
        job = array("q", (*numbers, *own, *map(at, tensors)))
        job.extend([0] * (NUM_FIELDS - len(job)))
        return job


HALF_PANEL = 32  # of half_block.h
NUM_FIELDS = 28  # of `Job` in job.h
# by what matrix_unit.h says
NO_MATRIX_UNIT = ("the compiler or the processor knows no AMX", "", "Linux does not let this process use AMX")

"""A layer's few tokens as one call of the compiled library, put together once."""

from array import array
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from turnout.contracts import FewCall
from turnout.kernels.arguments import check
from turnout.tensors import Assignment, RouterOutput, SoftmaxChoice


class CompiledFew(FewCall):
    """`Few` of few.h. What a call takes here it takes again for every token: no views, and one operator of torch."""

    def __init__(
        self, function: Callable[..., int], fields: "array[int]", choice: SoftmaxChoice, reads: tuple[Tensor, ...]
    ) -> None:
        self._function, self._fields, self.reads = function, fields, reads
        self._few = fields.buffer_info()[0]
        self._num_experts, self._dim = choice.weight_ED.shape
        self._k = choice.k

    def __call__(self, x: Tensor) -> tuple[Tensor, Callable[[], RouterOutput]]:
        num_tokens = x.numel() // self._dim
        y = torch.empty_like(x)
        num, size = num_tokens * self._k, num_tokens * self._num_experts
        # not a tensor before somebody asks: the first use of an operator takes 50 to 100 us, since weights have pushed
        # what is not in use out of the caches
        found = array("q", bytes(8 * (3 * num + (num + 2 * size + 1) // 2)))
        at = found.buffer_info()[0]
        check(self._function(self._few, x.data_ptr(), y.data_ptr(), at, num_tokens, torch.get_num_threads()))
        return y, partial(_routing, found, num_tokens, self._num_experts, self._k)


def _routing(found: "array[int]", num_tokens: int, num_experts: int, k: int) -> RouterOutput:
    """What the call wrote, with the names it has elsewhere."""
    num, size = num_tokens * k, num_tokens * num_experts
    found_M = torch.frombuffer(found, dtype=torch.int64)
    expert_N, token_N, choice_N = found_M[: 3 * num].view(3, -1)
    weight_N, scores, logits = found_M[3 * num :].view(torch.float32)[: num + 2 * size].split((num, size, size))
    assignment = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=choice_N,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=k,
    )
    return RouterOutput(
        assignment=assignment,
        logits_RE=logits.view(num_tokens, num_experts),
        scores_RE=scores.view(num_tokens, num_experts),
        token_R=torch.arange(num_tokens, device="cpu"),
    )

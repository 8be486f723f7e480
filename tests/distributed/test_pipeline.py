"""Chunks overlap as the pipeline says, on the way there, back, and in the gradient, which is the same in reverse."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from turnout.comm import Ledger, wire
from turnout.comm.cuts import cut_plan, lengths_of
from turnout.comm.wire import Route, send_rows
from turnout.dispatch import by_token, plan_dispatch
from turnout.parallel.pipeline import Way, pipelined
from turnout.segments import gather
from turnout.tensors import Admission, Assignment

FORWARD = (
    "begin there 0, begin there 1, begin there 2 | end there 0, compute 0, begin back 0 | "
    "end there 1, compute 1, begin back 1 | end there 2, compute 2, begin back 2 | end back 0, end back 1, end back 2"
)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What begins and ends, in order, of exchanges that bring every rank its own rows."""
    log: list[str] = []

    class Echo:
        def __init__(self, parts: list[tuple[Tensor, object]], route: Route, phase: str) -> None:
            self.out, self.layer = [tensor for tensor, _ in parts], route.layer
            log.append(f"begin {self.layer}")

        def land(self) -> list[Tensor]:
            log.append(f"end {self.layer}")
            return self.out

    monkeypatch.setattr(wire, "Flight", Echo)
    return log


def route(layer: str) -> Route:
    splits = ((1,), (1,))
    return Route(group=None, peers=(0,), rank=0, rows=splits, labels=((), ()), ledger=Ledger(), layer=layer)  # type: ignore[arg-type]


def test_while_a_chunk_computes_its_neighbours_travel_and_the_gradient_reverses_it(events: list[str]) -> None:
    class Compute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, chunk: int) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.chunk = chunk
            events.append(f"compute {chunk}")
            return 2 * x

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            events.append(f"compute {ctx.chunk}")
            return 2 * grads[0], None

    def there(chunk: int, x: Tensor) -> Way[tuple[int, Tensor]]:
        sent = send_rows(x, route(f"there {chunk}"))
        yield
        return chunk, sent.land()

    def back(chunk: int, y: Tensor) -> Way[Tensor]:
        sent = send_rows(y, route(f"back {chunk}"))
        yield
        return sent.land()

    x_TD = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    ways = [there(chunk, x) for chunk, x in enumerate(x_TD.split(1))]
    y_TD = torch.cat(pipelined(ways, lambda here: back(here[0], Compute.apply(here[1], here[0]))))
    forward = FORWARD.replace(" | ", ", ").split(", ")
    assert events == forward
    events.clear()
    (3 * y_TD).sum().backward()
    turned = {"begin": "end", "end": "begin"}
    want = [" ".join(turned.get(word, word) for word in event.split()) for event in reversed(forward)]
    assert events == want
    assert x_TD.grad is not None
    assert bool((x_TD.grad == 6).all())


@pytest.mark.parametrize("legs", [0, 1, 2, 3])
def test_an_exchange_of_more_legs_begins_as_many_chunks_ahead(legs: int) -> None:
    log: list[str] = []

    def way(kind: str, chunk: int) -> Iterator[None]:
        for leg in range(legs):
            log.append(f"{kind}{chunk}.{leg}")
            yield
        log.append(f"{kind}{chunk} ends")
        return chunk

    def compute_and_return(chunk: int) -> Way[int]:
        log.append(f"compute {chunk}")
        return way("K", chunk)  # type: ignore[return-value]

    chunks, last = range(4), legs - 1
    assert pipelined([way("S", chunk) for chunk in chunks], compute_and_return) == [0, 1, 2, 3]  # type: ignore[misc]
    assert len(log) == len(set(log)) == 4 * (2 * legs + 3)
    at = {event: number for number, event in enumerate(log)}
    for chunk in chunks if legs else ():
        assert at[f"S{chunk}.0"] < at["compute 0"]
        # while a chunk computes, the next one's last leg is on its way, and so is what the one before brings home
        assert at[f"S{min(chunk + 1, 3)}.{last}"] < at[f"compute {chunk}"] < at[f"K{chunk}.0"]
        assert at["compute 3"] < at[f"K{chunk} ends"]
    assert all(at[f"K{chunk}.{last}"] < at["compute 3"] for chunk in chunks[:-2] if legs == 2)


@pytest.mark.parametrize(("tokens", "chunks"), [(7, 1), (7, 3), (2, 8), (0, 2)])
def test_chunks_have_the_rows_of_their_tokens_in_the_order_of_the_whole(tokens: int, chunks: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    num_experts = 5
    expert_N = torch.randint(num_experts, (3 * tokens,), generator=g)
    token_N = torch.randint(max(1, tokens), (3 * tokens,), generator=g)
    weight_N = torch.rand(3 * tokens, generator=g)
    assignment = Assignment(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weight_N,
        choice_N=torch.zeros_like(token_N),
        num_tokens=tokens,
        num_experts=num_experts,
    )
    admission = Admission(keep_N=torch.rand(3 * tokens, generator=g) < 0.8, capacity=None, dropped_E={})
    plan = plan_dispatch(assignment, admission)
    cut = cut_plan(plan, tokens, chunks)
    assert sum(cut.tokens) == tokens
    assert torch.equal(cut.counts_GE.sum(dim=0), plan.counts_E)
    x_TD, first, found = torch.rand(tokens, 2, generator=g), 0, []
    for part, size in zip(cut.plans(cut.counts_GE.sum(dim=1).tolist()), cut.tokens, strict=True):
        assert torch.equal(expert_N[part.assignment_M].bincount(minlength=num_experts), part.counts_E)
        assert bool((expert_N[part.assignment_M].diff() >= 0).all())
        x_MD = gather(x_TD[first : first + size], by_token(part))
        assert torch.equal(x_MD, x_TD[token_N[part.assignment_M]])
        assert torch.equal(
            part.token_M[part.row_by_token_M].bincount(minlength=size).cumsum(0)[:-1], part.row_offset_T[1:]
        )
        found += part.assignment_M.tolist()
        first += size
    assert sorted(found) == sorted(plan.assignment_M.tolist())


def test_lengths_are_as_equal_as_may_be() -> None:
    assert lengths_of(10, 4) == (2, 3, 2, 3)
    assert lengths_of(1, 2) == (0, 1)

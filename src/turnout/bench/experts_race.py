"""Triton's kernels on the GPU at hand: their configs in turns, then the best of them against what `auto` takes else.

What is found goes to the cache: `auto` takes fused_triton for experts of a shape once it has won every race they had.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, passed_by
from turnout.experts.choose import PREFERENCE
from turnout.kernels.gpu.configs import Config
from turnout.kernels.gpu.tuned import Shape, candidates_for, keep_config, keep_race, shape_of, size_of
from turnout.layers.expert_pass import pass_experts
from turnout.tensors import Admission, Assignment

Step = Callable[[], object]
ALL = Admission(keep_N=None, capacity=None, dropped_E={})


@dataclass(frozen=True, kw_only=True)
class Race:
    """Medians of milliseconds."""

    where: str  # tokens, choices, and whether a backward pass belonged to it
    config: Config
    config_ms: tuple[float, ...]  # of each candidate; infinite for one that does not run or computes something else
    rival: str
    ms: float
    rival_ms: float


def race_experts(
    experts: FFNExperts, *, num_tokens: int, top_k: int, train: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Race:
    """Tokens at random, experts at random; the result is kept in the cache.

    Raises: ConfigError where fused_triton cannot run.
    """
    device = experts.up_EDG.device
    backend = ExpertBackend.TABLE["fused_triton"]
    refusal = backend.refusal(experts, dtype=dtype, device=device)
    if refusal is not None:
        raise ConfigError(f"backend='fused_triton' cannot race: {refusal.reason}")
    others = passed_by(experts, dtype=dtype, device=device)
    rival = next(name for name in PREFERENCE if name != "fused_triton" and not others[name])
    x_TD = torch.randn(num_tokens, experts.dim, device=device, dtype=dtype, requires_grad=train)
    assignment = drawn_assignment(num_tokens, experts.num_experts, top_k, device=device)
    shape = shape_of(tuple(experts.down_EFD.shape), experts.kind, device, dtype)
    config, config_ms = _fastest(experts, shape, x_TD, assignment, train=train)
    steps = {name: step_of(name, experts, x_TD, assignment, train=train) for name in ("fused_triton", rival)}
    found = medians(steps, rounds=15)
    where = f"T{num_tokens} K{top_k} {'forward and backward' if train else 'forward'}"
    keep_race(shape, where, rival=rival, ms=found["fused_triton"], rival_ms=found[rival])
    return Race(
        where=where,
        config=config,
        config_ms=config_ms,
        rival=rival,
        ms=found["fused_triton"],
        rival_ms=found[rival],
    )


def drawn_assignment(num_tokens: int, num_experts: int, top_k: int, *, device: torch.device) -> Assignment:
    """`top_k` different experts for each token, all equally likely, with weights that sum to 1."""
    weight_TE, expert_TE = torch.rand(num_tokens, num_experts, device=device).sort(dim=1, descending=True)
    weight_TK = weight_TE[:, :top_k] / weight_TE[:, :top_k].sum(dim=1, keepdim=True)
    return Assignment(
        token_N=torch.arange(num_tokens, device=device).repeat_interleave(top_k),
        expert_N=expert_TE[:, :top_k].flatten(),
        weight_N=weight_TK.flatten().requires_grad_(),
        choice_N=torch.arange(top_k, device=device).repeat(num_tokens),
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=top_k,
    )


def step_of(name: str, experts: FFNExperts, x_TD: Tensor, assignment: Assignment, *, train: bool) -> Step:
    """One pass by the backend of that name; with `train` all gradients too."""
    backend = ExpertBackend.TABLE[name]

    def forward() -> Tensor:
        return pass_experts(experts, backend, x_TD, assignment, ALL, dispatcher=LocalDispatcher())

    return trained(forward, [x_TD, assignment.weight_N, *experts.parameters()]) if train else torch.no_grad()(forward)


def trained(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Step:
    """The pass and the gradients of all leaves, for one and the same random gradient of its output."""
    y_grad = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, y_grad)


def medians(steps: Mapping[str, Step], *, rounds: int, warmup: int = 3) -> dict[str, float]:
    """Milliseconds on the device, in turns, by events."""
    ms: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warmup + rounds):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # about a millisecond in which the host gets ahead: its launches are not what is timed
            torch.cuda._sleep(2_000_000)
            begin.record()
            step()
            end.record()
            end.synchronize()
            if number >= warmup:
                ms[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in ms.items()}


def _fastest(
    experts: FFNExperts, shape: Shape, x_TD: Tensor, assignment: Assignment, *, train: bool
) -> tuple[Config, tuple[float, ...]]:
    """Each candidate is made the one `config_for` gives; it stays if it computes what the first does, and fastest."""
    num = len(assignment.token_N)
    choices = candidates_for(shape, size_of(num))
    first = _output(experts, x_TD, assignment, shape, choices[0])
    times = []
    for config in choices:
        try:
            difference = _output(experts, x_TD, assignment, shape, config) - first
            is_right = bool(difference.norm() <= 1e-2 * first.norm())
            step = step_of("fused_triton", experts, x_TD, assignment, train=train)
            times.append(medians({"": step}, rounds=7)[""] if is_right else float("inf"))
        except Exception:  # Triton's own, where a config wants more shared memory than the device has
            times.append(float("inf"))
    config = choices[times.index(min(times))]
    keep_config(shape, num, config, ms=min(times))
    return config, tuple(times)


def _output(experts: FFNExperts, x_TD: Tensor, assignment: Assignment, shape: Shape, config: Config) -> Tensor:
    keep_config(shape, len(assignment.token_N), config, ms=0.0)
    with torch.no_grad():
        y_TD = step_of("fused_triton", experts, x_TD, assignment, train=False)()
    assert isinstance(y_TD, Tensor)
    return y_TD.float()

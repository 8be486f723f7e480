"""Where the time of a step goes: shares of the parts of a model, by the operators that torch's profiler saw."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

STEPS = 2
REST = "everything else"
# the first that is in an operator's name has its time; products are those of maps between widths
PARTS = {
    "experts": ("_Fused", "grouped_mm", "fused_experts"),
    "attention": ("attention",),
    "products": ("::mm", "::addmm", "::bmm", "::linear"),
    "loss": ("log_softmax", "nll_loss", "CrossEntropy"),
    "optimizer": ("adamw", "Optimizer"),
    "routing and order": ("topk", "sort", "index", "gather", "scatter", "bincount", "argmax", "histc", "cumsum"),
}
NOT_EXPERTS = ("_FusedRMSNorm", "_FusedSwiGLU")


def time_split(step: Callable[[], object]) -> dict[str, float]:
    """Share of each part in the time that threads of this process spent in operators during a step; sums to 1.

    Time inside an operator counts for it and not for the one that called it. What no part claims (activations,
    norms, copies, Python between operators is not seen) is in `everything else`.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            step()
    spent = dict.fromkeys([*PARTS, REST], 0.0)
    for event in seen.key_averages():
        spent[_part(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {part: share / whole for part, share in spent.items()}


def _part(operator: str) -> str:
    if any(name in operator for name in NOT_EXPERTS):
        return REST
    return next((part for part, names in PARTS.items() if any(name in operator for name in names)), REST)

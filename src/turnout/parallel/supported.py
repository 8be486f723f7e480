"""Which strategies this version trains with: what cannot be honoured is refused, never passed over."""

from typing import Any

from turnout.alltoall import PROGRAMS
from turnout.errors import ConfigError
from turnout.parallel.stage_schedules import check_schedule
from turnout.strategy import Strategy

# fields that `turnout plan` knows and training does not yet -> the one value that training has
_ONLY: dict[str, Any] = {
    "cp": 1,
    "recompute": "none",
    "dispatch_precision": "",
    "grad_precision": "fp32",
}

# degrees of Tutel's pipelining: Hwang et al. 2022, arXiv:2206.03382, section 4.2
CHUNKS = (1, 2, 4, 8)


def check_supported(strategy: Strategy) -> None:
    """Raises: ConfigError naming the field, its value and the legal one."""
    for name, legal in _ONLY.items():
        value = getattr(strategy, name)
        if value != legal:
            raise ConfigError(
                f"strategy.{name}={value!r} can be planned (turnout plan) but not trained with in this version; "
                f"legal: {legal!r}"
            )
    _check_stages(strategy)
    _check_tensor(strategy)
    if strategy.overlap not in CHUNKS:
        near = min(CHUNKS, key=lambda legal: (abs(legal - strategy.overlap), legal))
        raise ConfigError(
            f"strategy.overlap={strategy.overlap} can be planned (turnout plan) but not trained with in this version; "
            f"legal: {', '.join(map(str, CHUNKS))}; nearest: {near}"
        )
    if strategy.zero not in (0, 3):
        near = 3 if strategy.zero == 2 else 0
        raise ConfigError(
            f"strategy.zero={strategy.zero} can be planned (turnout plan) but not trained with in this version; "
            f"legal: 0, 3; nearest: {near}"
        )
    if strategy.zero_size and not strategy.zero:
        raise ConfigError(f"strategy.zero_size={strategy.zero_size} needs strategy.zero=3; nearest legal: 0")
    if strategy.zero_size == 1:
        raise ConfigError(
            "strategy.zero_size=1 with strategy.zero=3 shards nothing; nearest legal: zero=0, zero_size=0"
        )
    if strategy.alltoall not in PROGRAMS:
        PROGRAMS[strategy.alltoall]


def _check_stages(strategy: Strategy) -> None:
    """What pipeline stages cannot do yet."""
    if strategy.pp == 1:
        return
    check_schedule(strategy)
    for name, legal in (("sequence_parallel", False), ("zero_sum", "micro_batch"), ("scatter_gather", False)):
        if getattr(strategy, name) != legal:
            raise ConfigError(
                f"strategy.{name}={getattr(strategy, name)!r} with pp={strategy.pp} can be planned (turnout plan) but "
                f"not trained with in this version; nearest legal: {name}={legal!r}, or pp=1"
            )
    if strategy.schedule == "zero_bubble" and strategy.zero:
        raise ConfigError(
            f"strategy.schedule='zero_bubble' with zero={strategy.zero}: torch splits the backward pass, and FSDP lets "
            "go of weights that the second half needs; nearest legal: '1f1b', or zero=0"
        )
    if strategy.schedule == "zero_bubble" and strategy.tp > 1:
        # torch's split backward pass goes from each use of a weight to the next, and over the sums between them twice
        raise ConfigError(
            f"strategy.schedule='zero_bubble' with tp={strategy.tp}: torch splits no backward that uses a weight on "
            "both sides of a sum over ranks, as biases are; nearest legal: '1f1b', or tp=1"
        )


def _check_tensor(strategy: Strategy) -> None:
    """What tensor-parallel ranks cannot do yet."""
    if strategy.tp == 1:
        return
    if strategy.etp > 1 and not strategy.tokens_sharded:
        raise ConfigError(
            f"strategy.etp={strategy.etp} with tp={strategy.tp}: slices of an expert would get every token tp times; "
            "nearest legal: shard_tokens=True, sequence_parallel=True, or etp=1"
        )
    if strategy.alltoall == "coordinated":
        raise ConfigError(
            f"strategy.alltoall='coordinated' with tp={strategy.tp} can be planned (turnout plan) but not trained with "
            "in this version; nearest legal: 'flat' with shard_tokens=True, where each rank sends its share too"
        )


def check_shards(strategy: Strategy, *, has_experts: bool) -> None:
    """Raises: ConfigError if a strategy whose dp is known has shards of shards, which this version does not make."""
    if not has_experts or not strategy.zero or strategy.ep * strategy.etp == 1 or strategy.edp() == 1:
        return
    shared = f"ep={strategy.ep}, etp={strategy.etp} on dp={strategy.dp} ranks"
    if strategy.expert_copies:
        raise ConfigError(
            f"strategy.expert_copies={strategy.expert_copies} with zero=3 would lie in shards ({shared}), which this "
            f"version does not sum over copies; nearest legal: zero=0, or ep={strategy.world() // strategy.etp}"
        )
    if strategy.overlap > 1:
        raise ConfigError(
            f"strategy.overlap={strategy.overlap} with zero=3 would gather shards of shared experts ({shared}) for "
            "every chunk; nearest legal: overlap=1"
        )
    if strategy.expert_parts != strategy.etp:
        raise ConfigError(
            f"strategy.adaptive_r={strategy.adaptive_r} with zero=3 would gather slices of shards ({shared}), which "
            "this version does not; nearest legal: -1"
        )
    if strategy.zero_size not in (0, strategy.dp):
        raise ConfigError(
            f"strategy.zero_size={strategy.zero_size} with copies of shared experts ({shared}) is not in this version; "
            "nearest legal: 0"
        )

"""Expert traffic of a step, counted by running the all-to-all programs themselves."""

from collections.abc import Iterator
from functools import lru_cache

from turnout.alltoall import PROGRAMS, LoadedRouting, RowSize, Traffic, UniformRouting, round_trip, traffic_of
from turnout.errors import ConfigError
from turnout.plan.collectives import Collective, all_gather, all_to_all, chunked, collective, group
from turnout.plan.step import Step, layers_of
from turnout.strategy import Strategy
from turnout.topology import Mesh

Expected = UniformRouting | LoadedRouting
FP8_SCALE_BYTES = 4 / 128  # an fp32 scale for 128 elements: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2
LABEL_BYTES = 8.0  # which row (int32) and weight (fp32): they travel with each assignment of a merged row
# collectives whose rows go where tokens are routed: all ranks wait for the one that gets most
ROUTED = ("ep all-to-all", "ep recompute", "etp gather and scatter")
PARAMETER_BYTES = 4.0  # of a weight that is gathered, and of its gradient: fp32, whatever the products are in
LABEL_BACK_BYTES = 4.0  # gradient of that weight (fp32), on the way back of the backward pass


def expert_mesh(strategy: Strategy, devices_per_node: int) -> Mesh:
    """The expert-parallel group on its nodes: neighbours when folded, else ranks of the same tensor index."""
    return group(strategy.ep, strategy.etp if strategy.folded else strategy.tp, devices_per_node)


def expert_volume(step: Step) -> Iterator[Collective]:
    """Dispatch and combine, forward and backward, of every layer with experts.

    Raises: ConfigError if the experts do not fit their ranks, or the program does not fit the layout.
    """
    for experts, number in layers_of(step).items():
        if experts == 0:
            continue
        calls = number * step.micro_batches
        passed, again = exchange(step, experts, calls)
        yield chunked(passed, step.strategy.overlap)
        if step.strategy.recompute == "full":
            yield chunked(again, step.strategy.overlap)
        yield from expert_tensor_volume(step, experts, calls)
        yield from expert_weights_volume(step, experts, calls)


def exchange(step: Step, experts: int, calls: float = 1.0) -> tuple[Collective, Collective]:
    """The all-to-all of layers of so many experts, forward and backward; and what full recomputation sends again.

    Whole, however many chunks overlap.
    """
    strategy, routing = step.strategy, _routing(step, experts)
    tensor, width = _coordinated_ranks(strategy), step.shape.latent_dim or step.shape.dim
    # tokens stay where weights come to them
    calls = calls if strategy.expert_parts else 0.0
    there = _round_trip(strategy.alltoall, routing, tensor, row_size(strategy, width))
    back = _round_trip(strategy.alltoall, routing, tensor, row_size(strategy, width, labels=False))
    return (
        collective("ep all-to-all", "ep", routing.mesh, there + back, calls),
        collective("ep recompute", "ep", routing.mesh, there, calls),
    )


def _routing(step: Step, experts: int) -> Expected:
    """What a rank routes of one micro-batch in a layer of that many experts."""
    strategy = step.strategy
    mesh = expert_mesh(strategy, step.devices_per_node)
    tokens = step.tokens / step.micro_batches / (strategy.tp if strategy.tokens_sharded else 1)
    if not step.expert_loads:
        return UniformRouting(
            mesh=mesh,
            num_tokens=tokens,
            top_k=step.shape.top_k,
            num_experts=experts,
            capacity_factor=step.capacity_factor,
            node_limit=step.node_limit,
        )
    if len(step.expert_loads) != experts or step.capacity_factor != 1.0 or step.node_limit:
        raise ConfigError(
            f"expert_loads has {len(step.expert_loads)} experts; a layer has {experts}, and loads go with "
            f"capacity_factor=1.0 and node_limit=0 (they are {step.capacity_factor} and {step.node_limit})"
        )
    return LoadedRouting(mesh=mesh, num_tokens=tokens, top_k=step.shape.top_k, loads=step.expert_loads)


def row_size(strategy: Strategy, width: int, *, labels: bool = True) -> RowSize:
    """Bytes of a row to the experts and back. Gradients go out as rows do, and come back as results do.

    `labels`: of the forward pass, whose merged rows take weights along; the backward pass brings their gradients home.
    """
    element = strategy.dispatch_bytes + (FP8_SCALE_BYTES if strategy.dispatch_precision == "fp8" else 0.0)
    return RowSize(
        row_bytes=width * element,
        back_bytes=width * strategy.activation_bytes,
        label_bytes=LABEL_BYTES if labels else 0.0,
        label_back_bytes=0.0 if labels else LABEL_BACK_BYTES,
    )


def _coordinated_ranks(strategy: Strategy) -> int:
    if strategy.alltoall != "coordinated" or strategy.tp == 1:
        return 1
    if strategy.tokens_sharded or strategy.etp != strategy.tp:
        raise ConfigError(
            f"strategy.alltoall='coordinated' shares replicated tokens among the tensor-parallel ranks of an expert: "
            f"it needs etp=tp={strategy.tp} (etp={strategy.etp}) and tokens that are not sharded; nearest legal: 'flat'"
        )
    return strategy.tp


@lru_cache(maxsize=4096)
def _round_trip(program: str, routing: Expected, tensor: int, size: RowSize) -> Traffic:
    moves = round_trip(PROGRAMS[program], routing.mesh, tensor)
    return traffic_of(moves, routing, size, tensor=tensor)


def expert_tensor_volume(step: Step, experts: int, calls: float = 1.0) -> Iterator[Collective]:
    """Ranks with parts of an expert gather the rows each received, and scatter the sums of what they made of them."""
    strategy, parts = step.strategy, step.strategy.expert_parts
    if parts <= 1 or not strategy.tokens_sharded:
        return
    mesh = group(parts, strategy.etp // parts, step.devices_per_node)
    routing = _routing(step, experts)
    rows = routing.num_tokens * routing.top_k * step.capacity_factor * parts
    width = step.shape.latent_dim or step.shape.dim
    traffic = all_gather(mesh, rows * width * strategy.activation_bytes)
    passes = 6 if strategy.recompute == "full" else 4
    yield collective("etp gather and scatter", "etp", mesh, traffic, calls * passes)


def expert_weights_volume(step: Step, experts: int, calls: float = 1.0) -> Iterator[Collective]:
    """Slices that ranks gather to compute parts of experts, or all of them, and the way back of their gradients.

    Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, table 4 (P / E / r, and P).
    """
    strategy, parts = step.strategy, step.strategy.expert_parts
    ranks = strategy.etp // parts if parts else strategy.ep * strategy.etp
    if ranks == 1:
        return
    mesh = group(ranks, 1, step.devices_per_node)
    kept = experts * step.shape.expert_params / (strategy.ep * strategy.etp)
    passes = 3 if strategy.recompute == "full" else 2
    # a copy of what a rank keeps for each of the others
    traffic = all_to_all(mesh, ranks * kept * PARAMETER_BYTES)
    yield collective("expert weights", "etp", mesh, traffic, calls * passes)

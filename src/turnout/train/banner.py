"""What a run is about to do, in words and numbers, before any of it happens."""

from dataclasses import dataclass
from typing import Any

import torch

from turnout.comm import World
from turnout.comm.lines import intention
from turnout.contracts import ExpertBackend
from turnout.experts import available_backends, choose_backend, passed_by
from turnout.layers import MoE
from turnout.models.size import sizes
from turnout.parallel import cut_of
from turnout.parallel.sites import first_placement
from turnout.strategy import Strategy
from turnout.train.device import compute_dtype, pick_device
from turnout.train.estimate import copied_parameters, memory_per_rank
from turnout.train.recipe import Recipe, sequences_per_rank


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the banner."""

    name: str
    value: Any  # JSON
    text: str
    alarming: bool = False  # a person should not pass over it


def banner(recipe: Recipe, world: World | None = None) -> list[Fact]:
    """Sizes, FLOPs, memory, balance method and whether it is live, kernel path and why.

    Raises: ConfigError if the recipe cannot run here.
    """
    world = World() if world is None else world
    loop, model = recipe.loop, recipe.model
    size = sizes(model, loop.seq_len)
    device = pick_device(loop.device)
    dtype = compute_dtype(device, recipe)
    memory = memory_per_rank(recipe, world.size)
    tokens_per_step = loop.batch_size * loop.seq_len * loop.accumulate
    length = f"{loop.steps} steps" if loop.steps else f"{loop.minutes:g} minutes"
    return [
        Fact(name="recipe", value=recipe.name, text=f"{recipe.name}, seed {recipe.seed}, {length}"),
        Fact(name="data", value=recipe.data.corpus, text=f"{recipe.data.corpus}, vocabulary {model.vocab_size:,}"),
        Fact(
            name="parameters",
            value={"total": size.total, "active": size.active},
            text=f"{size.total / 1e6:.2f} M total, {size.active / 1e6:.2f} M active per token",
        ),
        Fact(
            name="flops_per_token",
            value=size.train_flops_per_token,
            text=f"{size.train_flops_per_token / 1e6:.1f} MFLOP a token in training",
        ),
        Fact(
            name="batch",
            value=tokens_per_step,
            text=f"{tokens_per_step:,} tokens a step ({loop.batch_size} x {loop.seq_len} x {loop.accumulate})",
        ),
        Fact(
            name="memory_bytes",
            value=memory,
            text=f"about {memory / 2**20:,.0f} MiB" + (" a rank" if world.size > 1 else ""),
        ),
        _balance(recipe),
        _kernel(recipe, device, dtype),
        Fact(name="device", value=str(device), text=f"{device}, {str(dtype).removeprefix('torch.')}"),
        _parallel(recipe, world),
        *_links(device, world),
        *_copies(recipe, world),
    ]


def _parallel(recipe: Recipe, world: World) -> Fact:
    if world.size == 1:
        return Fact(name="parallel", value={"ranks": 1}, text="none")
    strategy, each = recipe.strategy, sequences_per_rank(recipe, world.size)
    share = strategy.tp * strategy.pp
    whose = "each" if share == 1 else f"for every {share}"
    words = f"{world.size} ranks, {world.local_size} a node, {each} sequences {whose}; {_experts_on_ranks(strategy)}"
    words += f", in {strategy.overlap} chunks that overlap" if strategy.overlap > 1 else ""
    words += f"; attention and dense layers over {strategy.tp} ranks" if strategy.tp > 1 else ""
    words += " in sequence parallel" if strategy.sequence_parallel else ""
    words += _stages(recipe) if strategy.pp > 1 else ""
    words += f"; weights in shards over {strategy.zero_size or world.size} ranks" if strategy.zero else ""
    names = (
        "tp",
        "pp",
        "virtual_stages",
        "schedule",
        "sequence_parallel",
        "shard_tokens",
        "folded",
        "ep",
        "expert_copies",
        "etp",
        "adaptive_r",
        "alltoall",
        "overlap",
        "zero",
        "zero_size",
    )
    value = {"ranks": world.size} | {name: getattr(strategy, name) for name in names}
    return Fact(name="parallel", value=value, text=words)


def _links(device: torch.device, world: World) -> list[Fact]:
    """What carries rows and sums inside a node and between nodes."""
    if world.size == 1:
        return []
    words = "NCCL" if device.type == "cuda" else intention()
    inside = f"{words} inside a node" if world.local_size > 1 else ""
    between = ("NCCL" if device.type == "cuda" else "gloo") + " between nodes" if world.size > world.local_size else ""
    return [Fact(name="links", value=words, text="; ".join(filter(None, (inside, between))))]


def _copies(recipe: Recipe, world: World) -> list[Fact]:
    """Which experts have copies, and what those cost."""
    strategy, model = recipe.strategy, recipe.model
    if not strategy.expert_copies or model.moe is None or world.size == 1:
        return []
    first = first_placement(model.moe.num_experts, strategy)
    # weights, gradients and both moments in float32
    cost = 16 * copied_parameters(model, strategy)
    experts = ", ".join(map(str, first.copied))
    return [
        Fact(
            name="copies",
            value={"number": strategy.expert_copies, "experts": list(first.copied), "bytes_per_rank": cost},
            text=f"{strategy.expert_copies} of experts {experts} in each layer, from step "
            f"{recipe.loop.rebalance_every} on of the most loaded; weights, gradients and moments take "
            f"{cost:,} bytes more on a rank",
        )
    ]


def _stages(recipe: Recipe) -> str:
    """How many blocks are on each stage, and by which of torch's schedules they work."""
    strategy = recipe.strategy
    sizes = [str(len(layers)) for layers in cut_of(recipe.model, strategy, 0).layers]
    words = f"; {len(sizes)} stages of {', '.join(sizes)} blocks on {strategy.pp} ranks by {strategy.schedule}"
    return f"{words}, {recipe.loop.accumulate} micro-batches a step"


def _experts_on_ranks(strategy: Strategy) -> str:
    sliced = f"each expert cut over {strategy.etp} ranks"
    if strategy.expert_parts == 0 and strategy.ep * strategy.etp > 1:
        return f"experts of {strategy.ep * strategy.etp} ranks gathered for every pass, and tokens stay"
    if strategy.expert_parts != strategy.etp:
        sliced += f" and gathered in {strategy.expert_parts} parts"
    if strategy.ep == 1:
        return sliced if strategy.etp > 1 else "every rank has all experts"
    return f"experts over {strategy.ep} ranks by {strategy.alltoall}" + (f", {sliced}" if strategy.etp > 1 else "")


def _balance(recipe: Recipe) -> Fact:
    moe = recipe.model.moe
    if moe is None or not recipe.model.moe_layers():
        return Fact(name="balance", value=None, text="no experts in this model")
    terms = [
        {"loss": loss.TABLE.name_of(type(loss)), "coefficient": vars(loss).get("coefficient")} for loss in moe.losses
    ]
    live = any(loss.balances and term["coefficient"] for loss, term in zip(moe.losses, terms, strict=True))
    own = moe.router.own_balance
    words = [own] if own else []
    words += [f"{t['loss']} x {t['coefficient']:g}{'' if t['coefficient'] else ' (OFF)'}" for t in terms]
    is_live = live or bool(own)
    text = ", ".join(words or ["no auxiliary loss"])
    return Fact(
        name="balance",
        value={"live": is_live, "terms": terms, "router": own},
        text=text if is_live else f"NOT balanced: {text}",
        alarming=not is_live,
    )


def _kernel(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Fact:
    moe = recipe.model.moe
    if moe is None or not recipe.model.moe_layers():
        return Fact(name="experts", value=None, text="none")
    with torch.device("meta"):
        experts = MoE.from_config(recipe.model.dim, moe).experts

    def ask() -> tuple[ExpertBackend, dict[str, str]]:
        chosen = choose_backend(experts, moe.backend, dtype=dtype, device=device)
        reasons = passed_by if moe.backend == "auto" else available_backends
        return chosen, reasons(experts, dtype=dtype, device=device)

    # a backend may refuse to be compiled, which it knows only while it is
    chosen, reasons = torch.compile(ask, backend="eager")() if recipe.loop.compile else ask()
    name = chosen.TABLE.name_of(chosen)
    refused = "; ".join(f"{n}: {why}" for n, why in reasons.items() if why)
    compiled = "compiled, " if recipe.loop.compile else ""
    why = "asked for" if moe.backend != "auto" else "first choice of auto that takes these experts"
    return Fact(
        name="experts",
        value={"backend": name, "refused": {n: w for n, w in reasons.items() if w}},
        text=f"{moe.num_experts} of {moe.hidden} by {name} ({compiled}{why}{'; ' + refused if refused else ''})",
    )

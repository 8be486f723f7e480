"""Who runs in the case `layer` besides ours and transformers': other systems' layers, and sorting in plain torch.

torchtitan's experts compute in bfloat16 whatever the dtype; `sort-grouped_mm` is its way (rows sorted by expert, one
grouped product for each weight, rows added to their tokens) in the dtype asked for, and `sort-mm` has one product for
each expert instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.bench.layer_sorted import Sorted, activated
from turnout.bench.routers import Shape
from turnout.experts.activations import Activation
from turnout.verify.adapters.library import library_module

BENCH = "'turnout[bench]'"
TUTEL = "git+https://github.com/microsoft/tutel"
UNUSED_LOSS = "computes its balance loss, which nothing reads"


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Of everybody: the router, and what it chooses in the one batch; or the choices alone, which are then given."""

    router_ED: Tensor
    choices_TK: Tensor
    given: bool


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How a layer of (T, D) is built, and what is known of it."""

    build: Callable[[Shape, Routing], nn.Module]
    takes_choices: bool = False  # experts can be given in place of a router
    library: str = ""  # what it imports; empty: torch alone
    install: str = ""  # what pip is to be told
    refuses: Callable[[Shape, torch.dtype], str] = field(default=lambda _shape, _dtype: "")  # why not; empty: it runs
    differs: tuple[str, ...] = ()  # where it is not alike


class Expert(nn.Module):
    """An expert as a user of those systems writes it, gate and up in one product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gated = Activation.TABLE[shape.expert].gated
        self.up = nn.Linear(shape.dim, shape.hidden * (2 if self.gated else 1), bias=False)
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activated(self.up(x), gated=self.gated))


class _OutputOf(nn.Module):
    """A layer that is called with tokens in sequences, and gives more than the output."""

    def __init__(self, layer: nn.Module, seq_len: int, output: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.seq_len, self.output = layer, seq_len, output

    def forward(self, x_TD: Tensor) -> Tensor:
        x_BSD = x_TD.view(-1, self.seq_len, x_TD.shape[1])
        return self.output(self.layer, x_BSD).reshape(x_TD.shape)


def _deepspeed(shape: Shape, routing: Routing) -> nn.Module:
    """Its MOELayer in one process without a process group: no token dropped, nothing drawn."""
    sharded = library_module("deepspeed.moe.sharded_moe", install=BENCH)
    experts = library_module("deepspeed.moe.experts", install=BENCH)
    settings = {"min_capacity": 0, "drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
    gate = sharded.TopKGate(shape.dim, shape.experts, shape.k, **settings)
    bank = experts.Experts(Expert(shape), shape.experts, "ep_size_1")
    layer = sharded.MOELayer(gate, bank, "ep_size_1", 1, shape.experts)
    with torch.no_grad():
        gate.wg.weight.copy_(routing.router_ED)
    return _OutputOf(layer, shape.tokens, lambda layer, x_BSD: layer(x_BSD, None))


def _st_moe(shape: Shape, routing: Routing) -> nn.Module:
    """Its MoE over sequences, with as much room as the batch's fullest expert of a sequence needs."""
    capacity = most_of_a_sequence(shape, routing.choices_TK)
    # half a row more, because it rounds down
    factor = (capacity + 0.5) * shape.experts / shape.seq_len
    layer = library_module("st_moe_pytorch", install=BENCH).MoE(
        dim=shape.dim,
        num_experts=shape.experts,
        gating_top_n=shape.k,
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=factor,
        capacity_factor_eval=factor,
        experts=nn.ModuleList(Expert(shape) for _ in range(shape.experts)),
    )
    with torch.no_grad():
        layer.gate.to_gates.weight.copy_(routing.router_ED)
    return _OutputOf(layer, shape.seq_len, lambda layer, x_BSD: layer(x_BSD).outputs)


def _tutel(shape: Shape, routing: Routing) -> nn.Module:
    """Its layer with a capacity that drops nothing; written to its documentation, not run by our tests."""
    moe = library_module("tutel.moe", install=TUTEL)
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": shape.k, "capacity_factor": 0, "fp32_gate": True},
        model_dim=shape.dim,
        experts={
            "type": "ffn",
            "num_experts_per_device": shape.experts,
            "hidden_size_per_expert": shape.hidden,
            "activation_fn": F.gelu,
            "has_fc1_bias": False,
            "has_fc2_bias": False,
        },
    )
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(routing.router_ED)
    return _OutputOf(layer, shape.tokens, lambda layer, x_BSD: layer(x_BSD))


def most_of_a_sequence(shape: Shape, choices_TK: Tensor) -> int:
    """Rows of the fullest expert of any sequence."""
    expert_BN = choices_TK.view(-1, shape.seq_len * shape.k)
    counts_BE = torch.zeros(len(expert_BN), shape.experts, dtype=torch.int64)
    return int(counts_BE.scatter_add_(1, expert_BN, torch.ones_like(expert_BN)).max())


def _sorted(shape: Shape, routing: Routing, *, grouped: bool) -> nn.Module:
    given_TK = routing.choices_TK if routing.given else None
    return Sorted(shape, routing.router_ED, grouped=grouped, choices_TK=given_TK)


def _st_moe_refusal(shape: Shape, dtype: torch.dtype) -> str:
    if shape.k < 2:
        return "its gate needs two choices or more"
    return "" if dtype == torch.float32 else "its masks are float32"


def _tutel_refusal(shape: Shape, _: torch.dtype) -> str:
    return "its experts have no gate" if Activation.TABLE[shape.expert].gated else ""


OTHERS: Mapping[str, Peer] = {
    "sort-grouped_mm": Peer(build=partial(_sorted, grouped=True), takes_choices=True),
    "sort-mm": Peer(build=partial(_sorted, grouped=False), takes_choices=True),
    "deepspeed": Peer(
        build=_deepspeed,
        library="deepspeed",
        install=BENCH,
        differs=("pads every expert's rows to those of the fullest (drop_tokens=False)", UNUSED_LOSS),
    ),
    "st-moe-pytorch": Peer(
        build=_st_moe,
        library="st_moe_pytorch",
        install=BENCH,
        refuses=_st_moe_refusal,
        differs=(
            "has a capacity, in this batch as large as the fullest expert of a sequence needs: nothing is dropped",
            UNUSED_LOSS,
        ),
    ),
    "tutel": Peer(
        build=_tutel,
        library="tutel",
        install=TUTEL,
        refuses=_tutel_refusal,
        differs=("pads every expert's rows to those of the fullest (capacity_factor=0)", UNUSED_LOSS),
    ),
}

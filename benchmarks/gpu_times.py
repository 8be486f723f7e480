"""The layers gpu_session.py times, the limits they are held against, and the peers, where there are any."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnout.bench.experts_race import Step, drawn_assignment, medians, race_experts, step_of, trained
from turnout.experts import FFNExperts
from turnout.tensors import Assignment

DECODED_TOKENS = (1, 4, 16, 64)
ROUTINGS = 6  # that take turns, so that a step does not find its experts in the L2 cache
COPY_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of a layer of swiglu experts in bfloat16."""

    num_tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int

    @property
    def forward_flops(self) -> int:
        return 6 * self.num_tokens * self.top_k * self.dim * self.hidden

    @property
    def expert_bytes(self) -> int:
        return 2 * 3 * self.dim * self.hidden

    def experts(self) -> FFNExperts:
        """On the GPU, with weights that keep the size of what they multiply."""
        with torch.device("meta"):
            experts = FFNExperts(self.dim, self.hidden, self.num_experts)
        experts = experts.to(torch.bfloat16).to_empty(device="cuda")
        with torch.no_grad():
            for weight in experts.parameters():
                weight.normal_(std=weight.shape[1] ** -0.5)
        return experts


LAYERS = {
    "mixtral": Layer(num_tokens=32768, dim=4096, hidden=14336, num_experts=8, top_k=2),
    "fine-grained": Layer(num_tokens=32768, dim=2048, hidden=1024, num_experts=128, top_k=8),
}


@cache
def limits() -> dict[str, float]:
    """The rate of the dense products of each layer, forward and backward, and bytes read and written by a copy."""
    found = {f"{name} products, TFLOP/s": _product_rate(layer) for name, layer in LAYERS.items()}
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = medians({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    # a sum only reads, as decoding does
    words = source.view(torch.int64)
    read_ms = medians({"read": words.amax}, rounds=10)["read"]
    return {
        **found,
        "copy, TB/s": round(2 * COPY_BYTES / ms / 1e9, 2),
        "read, TB/s": round(COPY_BYTES / read_ms / 1e9, 2),
    }


def layer(name: str) -> dict[str, Any]:
    """The race of the configs, then everybody in turns: forward, and forward and backward."""
    sizes = LAYERS[name]
    experts = sizes.experts()
    race = race_experts(experts, num_tokens=sizes.num_tokens, top_k=sizes.top_k)
    rows = []
    failed: dict[str, str] = {}
    rate = limits()[f"{name} products, TFLOP/s"]
    for train in (False, True):
        steps = _contestants(sizes, experts, failed, train=train)
        limit_ms = sizes.forward_flops * (3 if train else 1) / rate / 1e9
        mode = "forward and backward" if train else "forward"
        for who, ms in medians(steps, rounds=10).items():
            rows.append({"case": f"{name} {mode}: {who}", "ms": round(ms, 4), "share": round(limit_ms / ms, 3)})
    return {
        "race": {"config": race.config.as_list(), "ms_of_each": race.config_ms, "where": race.where},
        "rows": rows,
        "failed": failed,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def decode(name: str) -> dict[str, Any]:
    """Milliseconds of a few tokens, as launched and as one CUDA graph, against reading the touched weights."""
    sizes = LAYERS[name]
    experts = sizes.experts()

    bytes_per_ms = limits()["read, TB/s"] * 1e9
    rows = []
    for num_tokens in DECODED_TOKENS:
        race_experts(experts, num_tokens=num_tokens, top_k=sizes.top_k, train=False)
        x_TD = torch.randn(num_tokens, sizes.dim, device="cuda", dtype=torch.bfloat16)
        drawn = [
            drawn_assignment(num_tokens, sizes.num_experts, sizes.top_k, device=x_TD.device) for _ in range(ROUTINGS)
        ]
        touched = sum(len(each.expert_N.unique()) for each in drawn)
        floor_ms = touched * sizes.expert_bytes / bytes_per_ms
        steps = {
            "fused_triton, CUDA graph": _graphs(experts, x_TD, drawn),
            "fused_triton, launched": _all_of("fused_triton", experts, x_TD, drawn),
            "grouped_mm, launched": _all_of("grouped_mm", experts, x_TD, drawn),
        }
        for who, ms in medians(steps, rounds=20).items():
            case = f"{name} decode T={num_tokens}: {who}"
            rows.append({"case": case, "ms": round(ms / ROUTINGS, 4), "share": round(floor_ms / ms, 3)})
    return {"rows": rows}


def _product_rate(sizes: Layer) -> float:
    """All six products of a dense network that takes as many rows, forward and backward, and nothing else."""
    num, dim, hidden = sizes.num_tokens * sizes.top_k, sizes.dim, sizes.hidden
    shapes = ((num, dim), (num, 2 * hidden), (num, hidden), (dim, 2 * hidden), (hidden, dim))
    x, up, h, up_weight, down_weight = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)

    def products() -> None:
        torch.mm(x, up_weight)
        torch.mm(h, down_weight)
        torch.mm(x, down_weight.t())
        torch.mm(h.t(), x)
        torch.mm(up, up_weight.t())
        torch.mm(x.t(), up)

    return round(3 * sizes.forward_flops / medians({"": products}, rounds=10)[""] / 1e9, 1)


def _contestants(sizes: Layer, experts: FFNExperts, failed: dict[str, str], *, train: bool) -> dict[str, Step]:
    x_TD = torch.randn(
        sizes.num_tokens, sizes.dim, device="cuda", dtype=torch.bfloat16, requires_grad=train
    )  # fmt: skip
    assignment = drawn_assignment(sizes.num_tokens, sizes.num_experts, sizes.top_k, device=x_TD.device)
    steps = {n: step_of(n, experts, x_TD, assignment, train=train) for n in ("fused_triton", "grouped_mm")}
    steps["dense network of the same FLOPs"] = _dense(sizes, train=train)
    for name, make in PEERS.items():
        try:
            forward, leaves = make(sizes, experts, x_TD, assignment)
            steps[name] = trained(forward, leaves) if train else torch.no_grad()(forward)
            steps[name]()
        except ImportError:
            failed[name] = "not installed"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
        if name in failed:
            steps.pop(name, None)
    return steps


def _dense(sizes: Layer, *, train: bool) -> Step:
    """One swiglu network on as many rows as there are assignments."""
    num = sizes.num_tokens * sizes.top_k
    shapes = ((num, sizes.dim), (sizes.dim, 2 * sizes.hidden), (sizes.hidden, sizes.dim))
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[0] ** -0.5) for shape in shapes]
    x, up, down = (leaf.requires_grad_(train) for leaf in leaves)

    def forward() -> Tensor:
        gate, value = (x @ up).chunk(2, dim=1)
        return (functional.silu(gate) * value) @ down

    return trained(forward, leaves) if train else torch.no_grad()(forward)


def _all_of(name: str, experts: FFNExperts, x_TD: Tensor, drawn: list[Assignment]) -> Step:
    steps = [step_of(name, experts, x_TD, each, train=False) for each in drawn]
    return lambda: [step() for step in steps]


def _graphs(experts: FFNExperts, x_TD: Tensor, drawn: list[Assignment]) -> Step:
    run = _all_of("fused_triton", experts, x_TD, drawn)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


Forward = tuple[Callable[[], Tensor], list[Tensor]]


def _module(module: nn.Module, x_TD: Tensor, call: Callable[[], Any]) -> Forward:
    def forward() -> Tensor:
        found = call()
        return found[0] if isinstance(found, tuple) else found

    return forward, [x_TD, *module.parameters()]


def _megablocks(sizes: Layer, experts: FFNExperts, x_TD: Tensor, assignment: Assignment) -> Forward:
    """Its dropless layer, with a router of its own. Interface: https://github.com/databricks/megablocks"""
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=sizes.dim,
        ffn_hidden_size=sizes.hidden,
        moe_num_experts=sizes.num_experts,
        moe_top_k=sizes.top_k,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=functional.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=torch.device("cuda"),
    )
    module = importlib.import_module("megablocks.layers.dmoe").dMoE(arguments).cuda().bfloat16()
    x_STD = x_TD.view(-1, 1, sizes.dim)
    return _module(module, x_TD, lambda: module(x_STD))


def _sonic(sizes: Layer, experts: FFNExperts, x_TD: Tensor, assignment: Assignment) -> Forward:
    """Its layer, with a router of its own. Interface: https://github.com/Dao-AILab/sonic-moe"""
    sonicmoe = importlib.import_module("sonicmoe")
    enums = importlib.import_module("sonicmoe.enums")
    module = sonicmoe.MoE(
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden,
        activation_function=enums.ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to("cuda", torch.bfloat16)
    backend = sonicmoe.KernelBackendMoE.sonicmoe
    return _module(module, x_TD, lambda: module(x_TD, kernel_backend_moe=backend))


def _scatter(sizes: Layer, experts: FFNExperts, x_TD: Tensor, assignment: Assignment) -> Forward:
    """Its gated experts, given our routing. Interface: https://github.com/shawntan/scattermoe"""
    module = importlib.import_module("scattermoe.mlp").GLUMLP(
        input_size=sizes.dim,
        hidden_size=sizes.hidden,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        activation=nn.SiLU(),
    ).to("cuda", torch.bfloat16)  # fmt: skip
    expert_TK, weight_TK = assignment.as_topk()
    weight_TK = weight_TK.detach().to(torch.bfloat16)
    return _module(module, x_TD, lambda: module(x_TD, weight_TK, expert_TK))


# written from their documentation; none of them was at hand to run
PEERS: dict[str, Callable[[Layer, FFNExperts, Tensor, Assignment], Forward]] = {
    "MegaBlocks dMoE, with its router": _megablocks,
    "SonicMoE, with its router": _sonic,
    "ScatterMoE GLUMLP": _scatter,
}

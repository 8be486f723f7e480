"""Who runs in the case `layer`: ours, transformers' block, a dense network of the FLOPs, and bare products.

`layer_others` has other systems' layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.bench.layer_others import OTHERS, Routing
from turnout.bench.routers import Shape
from turnout.contracts import ExpertBackend
from turnout.dispatch import Dropless, LocalDispatcher
from turnout.errors import ConfigError
from turnout.experts import INT8_BITS, FFNExperts, quantize_experts
from turnout.experts.activations import Activation
from turnout.kernels.pages import on_large_pages
from turnout.layers import MoE
from turnout.layers.expert_pass import pass_experts
from turnout.routers import TopK
from turnout.tensors import Admission, Assignment

OURS, THEIRS, DENSE, LIMIT, READ = "turnout-", "transformers-", "dense-ffn", "gemm-limit", "read-limit"
Forward = Callable[[Tensor], Tensor]


def forward_of(name: str, shape: Shape, choices_TK: Tensor | None, dtype: torch.dtype) -> tuple[Forward, list[Tensor]]:
    """The layer called `name` and its parameters; `choices_TK` are given experts, None: each has its own router.

    Raises: ConfigError if what the peer needs is not installed.
    """
    torch.manual_seed(0)
    if name == DENSE:
        layer: nn.Module = Dense(shape)
    elif name.startswith(OURS):
        layer = _ours(shape, name.removeprefix(OURS), choices_TK)
    elif name in OTHERS:
        chosen_TK = routed(shape) if choices_TK is None else choices_TK
        routing = Routing(router_ED=router_weight(shape), choices_TK=chosen_TK, given=choices_TK is not None)
        layer = OTHERS[name].build(shape, routing)
    else:
        layer = _theirs(shape, name.removeprefix(THEIRS), choices_TK)
    layer.to(dtype)
    return layer, list(layer.parameters())


def batch(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens and the gradient of what a layer makes of them, (T, D) each; the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    x_TD, y_grad_TD = (torch.randn(shape.tokens, shape.dim, generator=generator).to(dtype) for _ in range(2))
    return x_TD, y_grad_TD


def router_weight(shape: Shape) -> Tensor:
    """(E, D), of everybody's router: with few tokens one that meets fewer experts has less to read."""
    return torch.randn(shape.experts, shape.dim, generator=torch.Generator().manual_seed(1)) * 0.02


def routed(shape: Shape) -> Tensor:
    """(T, K), the experts that everybody's router gives to the tokens of the batch."""
    x_TD, _ = batch(shape, torch.float32)
    return (x_TD @ router_weight(shape).t()).topk(shape.k, dim=1).indices


def experts_met(shape: Shape, choices_TK: Tensor | None) -> int:
    """Experts that the tokens of the batch go to."""
    return len((routed(shape) if choices_TK is None else choices_TK).unique())


def products(shape: Shape, *, train: bool, dtype: torch.dtype) -> Callable[[], None]:
    """Every product with an expert's weight, as one of a dense network, in memory that is there already."""
    hidden, width = shape.k * shape.hidden, shape.k * shape.hidden * (2 if _is_gated(shape) else 1)
    operands = [
        [torch.randn(sizes, dtype=dtype) for sizes in ((shape.tokens, inner), (inner, outer), (shape.tokens, outer))]
        for inner, outer in ((shape.dim, width), (hidden, shape.dim))
    ]
    results = [[torch.empty_like(matrix) for matrix in matrices] for matrices in operands]

    def run() -> None:
        for (x, weight, y_grad), (x_grad, weight_grad, y) in zip(operands, results, strict=True):
            torch.mm(x, weight, out=y)
            if train:
                torch.mm(y_grad, weight.t(), out=x_grad)
                torch.mm(x.t(), y_grad, out=weight_grad)

    return run


def reading(shape: Shape, num_experts: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The weights of so many experts read once, all threads at it: what few tokens cannot be computed in less than."""
    parts = 3 if _is_gated(shape) else 2
    weights = on_large_pages(torch.empty(num_experts * parts * shape.dim * shape.hidden, dtype=dtype)).fill_(1.0)
    # as whole numbers, whose sum costs less than reading them
    return weights.view(torch.int64).sum


def run_experts(
    experts: FFNExperts, backend: ExpertBackend, x_TD: Tensor, choices_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """What experts make of tokens whose choices and weights are given, (T, D)."""
    num_tokens, k = choices_TK.shape
    assignment = Assignment(
        token_N=torch.arange(num_tokens).repeat_interleave(k),
        expert_N=choices_TK.flatten(),
        weight_N=weight_TK.flatten(),
        choice_N=torch.arange(k).repeat(num_tokens),
        num_tokens=num_tokens,
        num_experts=experts.num_experts,
        top_k=k,
    )
    admission: Admission = Dropless().admit(assignment)
    return pass_experts(experts, backend, x_TD, assignment, admission, dispatcher=LocalDispatcher())


class Dense(nn.Module):
    """A feed-forward network as wide as all experts of a token, as models are written: a linear map each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.k * shape.hidden
        self.gate = nn.Linear(shape.dim, hidden, bias=False) if _is_gated(shape) else None
        self.up = nn.Linear(shape.dim, hidden, bias=False)
        self.down = nn.Linear(hidden, shape.dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x_TD)))
        return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))


class _Routed(nn.Module):
    """Our experts with given choices, all of one weight."""

    def __init__(self, shape: Shape, backend: str, choices_TK: Tensor) -> None:
        super().__init__()
        self.experts = FFNExperts(shape.dim, shape.hidden, shape.experts, kind=shape.expert)
        self.backend, self.choices_TK = ExpertBackend.TABLE[backend], choices_TK

    def forward(self, x_TD: Tensor) -> Tensor:
        weight_TK = torch.full(self.choices_TK.shape, 1 / self.choices_TK.shape[1])
        return run_experts(self.experts, self.backend, x_TD, self.choices_TK, weight_TK)


class _Output(nn.Module):
    """Of the layer's result the output alone."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD).y


def _ours(shape: Shape, name: str, choices_TK: Tensor | None) -> nn.Module:
    backend = "fused_int8" if name in INT8_BITS else name
    layer = _layer(shape, backend, choices_TK)
    return quantize_experts(layer, precision=name) if name in INT8_BITS else layer


def _layer(shape: Shape, backend: str, choices_TK: Tensor | None) -> nn.Module:
    if choices_TK is not None:
        return _Routed(shape, backend, choices_TK)
    router = TopK(k=shape.k, renormalize=shape.k > 1)
    layer = MoE(shape.dim, shape.hidden, shape.experts, router=router, expert=shape.expert, losses=(), backend=backend)
    with torch.no_grad():
        layer.router.get_parameter("score.weight_ED").copy_(router_weight(shape))
    return _Output(layer)


def _theirs(shape: Shape, implementation: str, choices_TK: Tensor | None) -> nn.Module:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise ConfigError("the peer needs transformers: pip install 'turnout[bench]'") from error
    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        num_attention_heads=1,
        num_key_value_heads=1,
        experts_implementation=implementation,  # pyright: ignore[reportCallIssue]
    )
    block = MixtralSparseMoeBlock(config)
    if not _is_gated(shape):
        block.experts = _two_matrix_experts()(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        block.get_parameter("gate.weight").copy_(router_weight(shape))
    return _Block(block, choices_TK)


class _Block(nn.Module):
    def __init__(self, block: Any, choices_TK: Tensor | None) -> None:
        super().__init__()
        self.block, self.choices_TK = block, choices_TK

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.choices_TK is None:
            return self.block(x_TD.unsqueeze(0)).squeeze(0)
        weight_TK = torch.full(self.choices_TK.shape, 1 / self.choices_TK.shape[1], dtype=x_TD.dtype)
        return self.block.experts(x_TD, self.choices_TK, weight_TK)


def _two_matrix_experts() -> Any:
    """transformers' own decorator around GELU experts without a gate, which Mixtral does not have."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            num_experts, hidden, dim = config.num_local_experts, config.intermediate_size, config.hidden_size
            self.num_experts = num_experts
            self.up_proj = nn.Parameter(torch.empty(num_experts, hidden, dim))
            self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden))
            self.act_fn = nn.GELU()

        def forward(self, x_TD: Tensor, choices_TK: Tensor, weight_TK: Tensor) -> Tensor:
            """The loop of their eager experts."""
            y_TD = torch.zeros_like(x_TD)
            for expert in choices_TK.unique().tolist():
                token, place = torch.where(choices_TK == expert)
                h = self.act_fn(F.linear(x_TD[token], self.up_proj[expert]))
                row_MD = F.linear(h, self.down_proj[expert]) * weight_TK[token, place, None]
                y_TD.index_add_(0, token, row_MD.to(y_TD.dtype))
            return y_TD

    return Experts


def _is_gated(shape: Shape) -> bool:
    return Activation.TABLE[shape.expert].gated

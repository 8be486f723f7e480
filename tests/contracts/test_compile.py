"""torch.compile takes a whole layer, its losses too, and a whole model as one graph, on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turnout import MoE
from turnout.contracts import CapacityPolicy, RouterConfig
from turnout.losses import LoadBalance, RouterZ
from turnout.models import Decoder
from turnout.routers import TopK
from turnout.train.recipes import load_recipe

LAYERS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "losses": {"losses": (LoadBalance(count="first"), RouterZ())},
    "shared": {"shared_hidden": 16, "bias": True},
    "latent": {"latent_dim": 16, "expert": "gelu"},
    "no kernel": {"backend": "padded_bmm"},
    **{f"capacity {name}": {"capacity": CapacityPolicy.TABLE[name]()} for name in CapacityPolicy.TABLE.names()},
    **{
        f"router {name}": {"router": RouterConfig.TABLE[name](), "losses": ()}
        for name in ("cosine", "hash", "locmoe", "locmoe_plus", "quantile", "switch")
    },
    "router of one": {"router": TopK(k=1, renormalize=False)},
}


@pytest.fixture(autouse=True)
def traced_anew() -> None:
    torch._dynamo.reset()


def passed(run: Callable[..., tuple[Tensor, Tensor]], layer: nn.Module, x: Tensor, ids: Tensor) -> list[Tensor]:
    """y, the sum of the losses, and gradients of both."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y, loss = run(x, ids)
    return [y, loss, *torch.autograd.grad(y.float().square().sum() + loss, [x, *layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LAYERS), ("as it is", torch.bfloat16), ("shared", torch.bfloat16)],
)
def test_a_layer_is_one_graph_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = MoE(32, 40, 8, **LAYERS[name]).to(dtype).eval()
    x, ids = torch.randn(70, 32, dtype=dtype), torch.randint(100, (70,))

    def run(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = layer(x, token_ids=ids)
        return out.y, sum((term.value for term in out.losses), x.new_zeros((), dtype=torch.float32))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(passed(compiled, layer, x, ids), passed(run, layer, x, ids), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            bound = 1e-6 if dtype == torch.float32 else 2**-7
            assert (got - want).abs().max() <= bound * max(1.0, float(want.detach().abs().max()))
    with torch.no_grad():
        assert torch.allclose(compiled(x, ids)[0], run(x, ids)[0], atol=1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recipe", ["tiny", "tiny-dense"])
def test_a_model_is_one_graph(recipe: str, training: bool) -> None:
    model = Decoder(load_recipe(recipe).model).train(training)
    ids = torch.randint(100, (2, 24))
    found = torch._dynamo.explain(model)(ids)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons

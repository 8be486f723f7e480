"""Our routers against the routers of Hugging Face transformers: the same logits, experts and weights."""

import pytest
import torch
from torch import Tensor

from turnout.contracts import RouterConfig
from turnout.routers import DeepSeekV3, TopK
from turnout.verify.adapters.transformers_blocks import BLOCKS, TransformersLayer, from_transformers
from turnout.verify.cases import draw, gradients, layers
from turnout.verify.gradients import LEAST_MOVE
from turnout.verify.subject import Sizes

pytest.importorskip("transformers")

# block -> the row of our table that it is
ROUTERS: dict[str, RouterConfig] = {
    "mixtral": TopK(k=2),
    "qwen3_moe": TopK(k=2),
    "olmoe": TopK(k=2, renormalize=False),
    "deepseek_v3": DeepSeekV3(k=2, scale=2.5),
    "gpt_oss": TopK(k=2, bias=True),
}


def theirs(name: str, sizes: Sizes, seed: int) -> TransformersLayer:
    layer = from_transformers(name).layer(sizes, seed=seed, dtype=torch.float32)
    assert isinstance(layer, TransformersLayer)
    return layer


def test_every_block_of_the_suite_is_compared() -> None:
    assert set(ROUTERS) == set(BLOCKS)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("seed", range(5))
def test_the_same_logits_experts_and_weights(name: str, seed: int) -> None:
    sizes = Sizes(dim=16, hidden=8, num_experts=12, k=2)
    peer = theirs(name, sizes, seed).module.get_submodule(BLOCKS[name].router)
    ours = ROUTERS[name].build(sizes.dim, sizes.num_experts)
    with torch.no_grad():
        ours.get_parameter("score.weight_ED").copy_(peer.get_parameter("weight"))
        if name == "gpt_oss":
            ours.get_parameter("score.bias_E").copy_(peer.get_parameter("bias"))
        if name == "deepseek_v3":
            bias_E = torch.randn(sizes.num_experts, generator=torch.Generator().manual_seed(seed)) / 4
            peer.get_buffer("e_score_correction_bias").copy_(bias_E)
            ours.get_buffer("bias_E").copy_(bias_E)
    x_TD = torch.randn(65, sizes.dim, generator=torch.Generator().manual_seed(seed))
    logits_TE, weight_TK, expert_TK = peer(x_TD)
    routing = ours(x_TD)
    assert torch.equal(routing.logits_RE, logits_TE)
    expert_RK, weight_RK = routing.assignment.as_topk()
    # theirs come in any order within a token
    assert torch.equal(expert_RK.sort(dim=1).values, expert_TK.sort(dim=1).values)
    assert torch.allclose(dense(expert_RK, weight_RK, 12), dense(expert_TK, weight_TK, 12), rtol=0, atol=1e-6)


def dense(expert_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(expert_TK), num_experts).scatter(1, expert_TK, weight_TK.float())


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_limited_as_deepseek_s_block_limits_them(groups: int) -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=groups, topk_group=groups // 2
    )
    peer = DeepseekV3TopkRouter(config)
    ours = DeepSeekV3(k=4, groups=groups, top_groups=groups // 2, scale=config.routed_scaling_factor).build(16, 16)
    generator = torch.Generator().manual_seed(groups)
    with torch.no_grad():
        weight_ED = torch.randn(16, 16, generator=generator)
        peer.weight.copy_(weight_ED)
        ours.get_parameter("score.weight_ED").copy_(weight_ED)
        bias_E = torch.randn(16, generator=generator) / 4
        peer.e_score_correction_bias.copy_(bias_E)
        ours.get_buffer("bias_E").copy_(bias_E)
    x_TD = torch.randn(200, 16, generator=generator)
    _, weight_TK, expert_TK = peer(x_TD)
    expert_RK, weight_RK = ours(x_TD).assignment.as_topk()
    assert torch.allclose(dense(expert_RK, weight_RK, 16), dense(expert_TK, weight_TK, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_one_renormalised_choice_teaches_a_router_nothing_but_rounding(name: str) -> None:
    """Why G3 leaves sizes of one choice out where others fit, and counts as movement only what is above LEAST_MOVE."""
    subject = from_transformers(name)
    shares = {}
    for layer, words in layers(subject):
        x = draw(layer, 33).requires_grad_()
        found = gradients(layer, x, layer.forward(x))
        most = max(float(found[n].abs().max()) for n in layer.router_parameters() if n in found)
        shares["k=1" in words, words] = most / float(found["x"].abs().max())
    one, more = ([share for (is_one, _), share in shares.items() if is_one is wanted] for wanted in (True, False))
    assert len(one) == 1
    assert min(more) > 1e4 * LEAST_MOVE
    assert one[0] > 1e4 * LEAST_MOVE if name == "olmoe" else one[0] < 0.1 * LEAST_MOVE

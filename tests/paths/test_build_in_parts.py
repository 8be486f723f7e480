"""A decoder made module by module has the weights of one made at once, and leaves the generator where that does."""

import pytest
import torch

from turnout.contracts import RouterConfig
from turnout.layers import MoEConfig
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.mla import MLAConfig
from turnout.models import Decoder, ModelConfig
from turnout.models.decoder import build_block
from turnout.parallel.build import fill
from turnout.parallel.shards import Shards

GROUPED = AttentionConfig(
    num_heads=2, num_kv_heads=2, head_dim=8, bias=True, sinks=True, smear_keys=True, qk_norm="head"
)
LATENT = MLAConfig(num_heads=2, q_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6)


@pytest.mark.parametrize("name", RouterConfig.TABLE.names())
def test_a_decoder_drawn_in_parts_is_the_one_drawn_at_once(name: str) -> None:
    allowed = {"in_decoder": "allow"} if name == "expert_choice" else {}
    router = RouterConfig.TABLE[name](**allowed)
    attention: AttentionKind = LATENT if len(name) % 2 else GROUPED
    moe = MoEConfig(num_experts=16, hidden=8, router=router, losses=(), shared_hidden=4, latent_dim=4, bias=True)
    sized = ModelConfig(
        vocab_size=40, dim=16, num_layers=3, dense_first=1, hidden=12, attention=attention, moe=moe, norm="layer"
    )
    at_once, after = drawn(sized, in_parts=False)
    in_parts, after_parts = drawn(sized, in_parts=True)
    assert torch.equal(after, after_parts)
    assert at_once.keys() == in_parts.keys()
    assert all(torch.equal(in_parts[name], value) for name, value in at_once.items())


def drawn(config: ModelConfig, *, in_parts: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every tensor of a decoder, and the number that is drawn next."""
    torch.manual_seed(0)
    if in_parts:
        for layer in range(config.num_layers):
            build_block(config, layer=layer)
        with torch.device("meta"):
            model, whole = Decoder(config), Decoder(config)
        model.to_empty(device="cpu")
        fill(model, whole, Shards(cuts={}, group=None, has_first=True))
    else:
        model = Decoder(config)
    return dict(model.named_parameters()) | dict(model.named_buffers()), torch.rand(3)

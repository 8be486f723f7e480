"""Experts in 8-bit floating point: what their codes mean, and how they are computed where there is no GPU for them."""

import pytest
import torch
from torch import Tensor, nn

from turnout import MoE
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, Float8FFNExperts, available_backends, choose_backend, quantize_experts
from turnout.kernels import gpu
from turnout.kernels.fp8_codes import decode_matrix, decode_rows, encode_matrix, encode_rows, scale_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def drawn(*size: int) -> Tensor:
    """Numbers over nine orders of magnitude, and zeros."""
    generator = torch.Generator().manual_seed(sum(size))
    wide = torch.randn(size, generator=generator) * 10 ** torch.randn(size, generator=generator).mul(2)
    return wide.masked_fill(torch.rand(size, generator=generator) < 0.05, 0)


@pytest.mark.parametrize("most", [1e-38, 1e-30, 0.3, 447.9, 448.0, 448.1, 896.0, 3e38])
def test_a_scale_is_the_least_power_of_two_that_will_do(most: float) -> None:
    scale = float(scale_of(torch.tensor(most)))
    fraction, _ = torch.frexp(torch.tensor(scale))
    assert fraction == 0.5
    assert most / scale <= 448
    assert most < 1e-29 or most / (scale / 2) > 448


@pytest.mark.parametrize("size", [(1, 1), (128, 128), (130, 257), (300, 40)])
def test_a_matrix_is_off_by_half_a_step_at_most(size: tuple[int, int]) -> None:
    weight_IJ = drawn(*size)
    codes, scales = encode_matrix(weight_IJ)
    assert (codes.shape, codes.dtype) == (weight_IJ.shape, torch.float8_e4m3fn)
    assert scales.shape == tuple(-(-side // 128) for side in size)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: size[0], : size[1]]
    bound = (weight_IJ.abs() / 16).maximum(wide / 1024)
    assert ((decode_matrix(codes, scales) - weight_IJ).abs() <= bound).all()
    # what the codes stand for has the same codes
    again, same = encode_matrix(decode_matrix(codes, scales))
    assert torch.equal(decode_matrix(again, same), decode_matrix(codes, scales))


@pytest.mark.parametrize("block", [64, 128])
def test_rows_have_scales_of_their_own_for_each_block(block: int) -> None:
    x_MD = drawn(20, 300)
    x_MD[3] = 0
    codes, scale_MB = encode_rows(x_MD, block)
    wide = scale_MB.repeat_interleave(block, dim=1)[:, :300]
    bound = (x_MD.abs() / 16).maximum(wide / 1024)
    assert ((decode_rows(codes, scale_MB, block) - x_MD).abs() <= bound).all()
    loud = x_MD.clone()
    loud[:, :block] *= 1000
    # an outlier costs its own block alone
    assert torch.equal(encode_rows(loud, block)[0][:, block:].view(torch.uint8), codes[:, block:].view(torch.uint8))


@pytest.mark.parametrize("kind", ["relu", "swiglu"])
def test_the_weights_of_an_expert_are_those_of_its_codes(kind: str) -> None:
    experts = FFNExperts(40, 136, 3, kind=kind, bias=True, init_std=1.0).requires_grad_(False)
    rounded = Float8FFNExperts.of(experts)
    for e in range(3):
        for got, want in zip(rounded.weights_of(e), (experts.up_EDG[e], experts.down_EFD[e]), strict=True):
            assert got.shape == want.shape
            assert float((got - want).abs().max()) <= float(want.abs().max()) / 16
            assert float((got - want).norm()) < 0.03 * float(want.norm())
    assert rounded.up_codes.shape == (3, 2 if kind == "swiglu" else 1, 136, 40)


def test_weights_take_little_more_than_a_quarter_of_the_memory() -> None:
    experts = FFNExperts(256, 512, 4)
    before = sum(parameter.nbytes for parameter in experts.parameters())
    assert sum(buffer.nbytes for buffer in Float8FFNExperts.of(experts).buffers()) < 0.2502 * before


def test_a_saved_model_computes_the_same_whatever_it_was_cast_to() -> None:
    layer, other = (quantize_experts(MoE(40, 24, 4, bias=True), precision="fp8").eval() for _ in range(2))
    x = torch.randn(9, 40)
    with torch.no_grad():
        want = layer(x).y
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x).y, want)
        assert torch.equal(layer.bfloat16().float().experts.weights_of(1)[0], other.experts.weights_of(1)[0])
    assert {name for name, _ in layer.named_parameters()} == {"router.score.weight_ED"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_a_gpu_the_loop_widens_the_weights_and_rounds_no_row(dtype: torch.dtype) -> None:
    layer = quantize_experts(MoE(40, 24, 4, bias=True).to(dtype), precision="fp8").eval()
    exact = MoE(40, 24, 4, bias=True, backend="loop").to(dtype)
    exact.router.load_state_dict(layer.router.state_dict())
    ups, downs = zip(*(layer.experts.weights_of(e) for e in range(4)), strict=True)
    biases = {"up_bias_EG": layer.experts.up_bias_EG, "down_bias_ED": layer.experts.down_bias_ED}
    exact.experts.load_state_dict({"up_EDG": torch.stack(ups), "down_EFD": torch.stack(downs), **biases})
    x = torch.randn(9, 40, dtype=dtype)
    with torch.no_grad():
        # its matrices lie the other way round: products may add in another order
        torch.testing.assert_close(layer(x).y, exact(x).y)
    with pytest.raises(ConfigError, match="quantised experts are for inference alone: call the layer under"):
        layer(x.requires_grad_())


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(experts: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> str:
        return available_backends(experts, dtype=dtype, device=device)["fused_fp8"]

    experts = Float8FFNExperts(4, 4, 2)
    assert reason(experts) == "fused_fp8 computes on CUDA, not on cpu; use backend='loop'"
    assert "after quantize_experts(model, precision='fp8')" in reason(FFNExperts(4, 4, 2))
    assert "computes tokens in float32, bfloat16 and float16, not torch.float64" in reason(experts, torch.float64)
    with torch.device("meta"):
        assert "counts up to 1024 experts, not 1025" in reason(Float8FFNExperts(4, 4, 1025))
        assert "matrices of up to 2^30 weights, not 65536 x 32768" in reason(Float8FFNExperts(1 << 16, 1 << 15, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    told = "fused_fp8 needs compute capability 8.9 or later; this device has 8.0; use backend='loop'"
    assert reason(experts, device=CUDA) == told
    assert gpu.LEAST_CAPABILITY == (8, 0)
    for device in (CPU, CUDA):
        chosen = choose_backend(experts, "auto", dtype=torch.bfloat16, device=device)
        assert chosen is choose_backend(experts, "loop", dtype=torch.bfloat16, device=device)
    with pytest.raises(
        ConfigError, match="backend='fused_fp8' cannot run here: fused_fp8 computes on CUDA, not on cpu"
    ):
        quantize_experts(MoE(4, 4, 2, backend="fused_fp8"), precision="fp8")(torch.randn(3, 4))

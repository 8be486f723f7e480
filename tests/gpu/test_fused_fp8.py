"""Experts in 8-bit floating point by the kernels, against what their codes mean; on a GPU or in the interpreter."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import all_to_one, drawn_experts
from tests.gpu.test_fused_triton import EVERYTHING, side_by_side, to
from turnout import MoE
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.errors import ConfigError
from turnout.experts import Float8FFNExperts, choose_backend, fp8_op, quantize_experts
from turnout.kernels import KINDS
from turnout.kernels.fp8_codes import encode_rows
from turnout.kernels.gpu import configs, fp8_launch, fp8_proof
from turnout.kernels.gpu.configs import CodesConfig
from turnout.layers.expert_pass import pass_experts
from turnout.routers import TopK
from turnout.tensors import Admission, Assignment

FP8 = ExpertBackend.TABLE["fused_fp8"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes the interpreter some milliseconds, whatever it computes."""
    monkeypatch.setattr(fp8_op, "config_for", lambda num, num_experts: fp8_proof.PLAIN)


@torch.no_grad()
def passed(experts: Float8FFNExperts, x_TD: Tensor, assignment: Assignment, keep_N: Tensor | None = None) -> Tensor:
    admission = Admission(keep_N=keep_N, capacity=None, dropped_E={})
    return pass_experts(experts, FP8, x_TD, assignment, admission, dispatcher=LocalDispatcher())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", fp8_proof.DTYPE_TOLERANCE)
def test_every_kind_and_dtype_is_off_by_no_more_than_its_roundings(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert fp8_proof.worst_excess(kind, dtype, device) < 1


@pytest.mark.parametrize("name", ["CODES_MANY", "CODES_SOME", "CODES_FEW"])
@pytest.mark.parametrize(("dim", "hidden"), [(272, 208), (128, 256), (40, 24), (17, 9)])
def test_tiles_as_on_a_gpu_compute_the_same(name: str, dim: int, hidden: int, device: torch.device) -> None:
    """Widths of whole blocks, of parts of them, and of no 16 bytes' multiple, where nothing is fetched as a box."""
    generator = torch.Generator().manual_seed(0)
    up_EDG = torch.randn(2, dim, 2 * hidden, generator=generator) * dim**-0.5
    down_EFD = torch.randn(2, hidden, dim, generator=generator) * hidden**-0.5
    codes = fp8_proof.codes_of(up_EDG, down_EFD, [], "swiglu")
    assignment, x_TD = side_by_side(9, 2, 1), torch.randn(9, dim, generator=generator)
    inputs = (x_TD.to(device), assignment.weight_N.detach().to(device))
    routes = (assignment.token_N.to(device), assignment.expert_N.to(device), None)
    for config in {taken.boxed: taken for taken in getattr(configs, name)}.values():
        own = fp8_proof.on_device(codes, device)
        found = fp8_launch.forward(*inputs, *routes, own, config, top_k=1)
        rest = (x_TD, assignment.weight_N.detach(), assignment.expert_N.view(9, 1), codes, config)
        assert float(fp8_proof.excess(found, *rest)) < 1


def test_rows_are_rounded_as_torch_rounds_them(device: torch.device) -> None:
    """Outliers, zeros, the smallest numbers, and what is not a number."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(40, 300, generator=generator) * torch.randn(40, 1, generator=generator).mul(8).exp()
    x_TD[3], x_TD[4, 7], x_TD[5, :128], x_TD[6, 200] = 0, 1e4, 1e-38, torch.nan
    codes_TD, scale_TB = torch.empty(40, 300, dtype=torch.float8_e4m3fn), torch.empty(40, 3)
    got = (codes_TD.to(device), scale_TB.to(device))
    fp8_launch.round_kernel[(3, 3)](x_TD.to(device), *got, 40, D=300, SIDE=128, BLOCK_T=16)
    want = encode_rows(x_TD.nan_to_num())
    is_finite = x_TD.isfinite()
    assert torch.equal(got[0].cpu().view(torch.uint8)[is_finite], want[0].view(torch.uint8)[is_finite])
    assert got[0].cpu().float()[6, 200].isnan()
    assert torch.equal(got[1].cpu(), want[1])


def test_it_is_near_the_experts_it_was_made_of(device: torch.device) -> None:
    experts = drawn_experts(160, 144, 4, bias=True)
    x_TD = torch.randn(130, 160, generator=torch.Generator().manual_seed(1))
    assignment = side_by_side(130, 4, 3)
    with torch.no_grad():
        rest = (x_TD, assignment, EVERYTHING)
        want = pass_experts(experts, ExpertBackend.TABLE["loop"], *rest, dispatcher=LocalDispatcher())
    got = passed(Float8FFNExperts.of(experts).to(device), x_TD.to(device), to(assignment, device)).cpu()
    # six factors (x and weight of gate and of value; h; weight) rounded to 3 bits of mantissa: of such a number the
    # error is 1/42 in the root mean square, 2^-3 / 12^0.5 for a mantissa of (7/3)^0.5; all six 0.058, and silu is steep
    assert float((got - want).norm()) <= 0.08 * float(want.norm())


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_a_token_has_the_same_output_in_any_company(num_tokens: int, device: torch.device) -> None:
    experts = Float8FFNExperts.of(drawn_experts(160, 144, 4, bias=True)).to(device)
    x_TD = torch.randn(130, 160, generator=torch.Generator().manual_seed(1)).to(device)
    whole = to(side_by_side(130, 4, 2), device)
    parts = {name: getattr(whole, name)[: 2 * num_tokens] for name in ("token_N", "expert_N", "weight_N", "choice_N")}
    alone = replace(whole, **parts, num_tokens=num_tokens)
    assert torch.equal(passed(experts, x_TD[:num_tokens], alone), passed(experts, x_TD, whole)[:num_tokens])


def test_dropped_assignments_have_no_row_and_idle_experts_none_either(device: torch.device) -> None:
    experts = Float8FFNExperts.of(drawn_experts(24, 16, 4, bias=True)).to(device)
    x_TD = torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(device)
    assignment = to(side_by_side(40, 4, 2), device)
    keep_N = (torch.rand(80, generator=torch.Generator().manual_seed(3)) < 0.5).to(device)
    whole, got = passed(experts, x_TD, assignment), passed(experts, x_TD, assignment, keep_N)
    has_both, has_none = keep_N.view(40, 2).all(dim=1), ~keep_N.view(40, 2).any(dim=1)
    assert has_none.any()
    assert not got[has_none].any()
    assert torch.equal(got[has_both], whole[has_both])
    alone = to(all_to_one(40, 4), device)
    assert torch.equal(passed(experts, x_TD, alone), passed(experts, x_TD, replace(alone, top_k=1)))


def test_a_nan_spoils_its_own_token_and_one_in_an_expert_its_own_rows(device: torch.device) -> None:
    experts = Float8FFNExperts.of(drawn_experts(136, 24, 3)).to(device)
    x_TD = torch.randn(30, 136, generator=torch.Generator().manual_seed(1)).to(device)
    assignment = to(side_by_side(30, 3, 1), device)
    want = passed(experts, x_TD, assignment)
    x_TD[4, 130] = torch.nan
    experts.up_scales[1] = torch.tensor(torch.nan).view(torch.int32)
    spoilt = (assignment.expert_N == 1).index_fill(0, torch.tensor(4, device=device), True)
    for config in (fp8_proof.PLAIN, fp8_proof.FETCHED):
        got = passed_with(config, experts, x_TD, assignment)
        assert got[spoilt].isnan().all()
        # h has other blocks there
        assert torch.allclose(got[~spoilt], want[~spoilt], atol=0.1)


def passed_with(config: CodesConfig, experts: Float8FFNExperts, x_TD: Tensor, assignment: Assignment) -> Tensor:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fp8_op, "config_for", lambda num, num_experts: config)
        return passed(experts, x_TD, assignment)


def test_a_layer_takes_it_by_itself_in_one_graph(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = quantize_experts(MoE(40, 24, 3, router=TopK(k=2), losses=()), precision="fp8").to(device).eval()
    x = torch.randn(2, 9, 40, device=device)
    assert choose_backend(layer.experts, "auto", dtype=torch.float32, device=device) is FP8

    def graph(x: Tensor) -> Tensor:
        return layer(x).y

    with torch.no_grad():
        got, want = torch.compile(graph, backend="aot_eager", fullgraph=True)(x), graph(x)
    # in the interpreter the router's weights are another kernel's
    assert torch.allclose(got, want, atol=1e-6)
    with pytest.raises(ConfigError, match="quantised experts are for inference alone"):
        layer(x.requires_grad_())


def test_the_operator_is_what_its_fake_says(device: torch.device) -> None:
    experts, assignment = Float8FFNExperts.of(drawn_experts(20, 12, 3, bias=True)).to(device), side_by_side(7, 3, 2)
    codes = [experts.up_codes, experts.up_scales, experts.down_codes, experts.down_scales]
    own = to(assignment, device)
    inputs = (torch.randn(7, 20, device=device), own.weight_N.detach(), codes, experts.up_bias_EG)
    torch.library.opcheck(
        fp8_op.fp8_experts,
        (*inputs, experts.down_bias_ED, own.token_N, own.expert_N, None, None, "swiglu", 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernels_that_are_wrong_are_not_trusted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fp8_proof.forward

    def changed(name: str, change: float) -> str:
        def wrong(*given: object, **named: object) -> fp8_launch.Passed:
            found = right(*given, **named)  # type: ignore[arg-type]
            return replace(found, **{name: getattr(found, name) * change})

        monkeypatch.setattr(fp8_proof, "forward", wrong)
        return fp8_proof.prove("relu", torch.float32, device)

    assert "times as far off as torch.float32 may be here" in changed("y_TD", 1.02)
    assert "times as far off as torch.float32 may be here" in changed("h_scale_MB", 2.0)
    assert "fp8 are nan times as far off" in changed("y_TD", float("nan"))

    def broken(*given: object, **named: object) -> fp8_launch.Passed:
        raise OSError("no C compiler")

    monkeypatch.setattr(fp8_proof, "forward", broken)
    assert (
        fp8_proof.prove("relu", torch.float32, device)
        == "Triton's kernels of fp8 do not run here: OSError: no C compiler"
    )

"""The one wrapper around torch's grouped_mm: each of its traps, by itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from turnout import MoE
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, available_backends
from turnout.experts.grouped_mm import grouped_mm

COUNTS = torch.tensor([3, 0, 5, 1])
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def by_loop(x_MD: Tensor, weight_EDG: Tensor, counts_E: Tensor) -> Tensor:
    """The same in float64."""
    parts = x_MD.double().split(counts_E.tolist())
    return torch.cat([part @ weight.double() for part, weight in zip(parts, weight_EDG.unbind(), strict=True)])


def assert_equals_the_loop(x_MD: Tensor, weight_EDG: Tensor, counts_E: Tensor, *, tolerance: float) -> None:
    """Forward and both gradients; x_MD and weight_EDG may be laid out in any way."""
    x_leaf, weight_leaf = x_MD.detach().requires_grad_(), weight_EDG.detach().requires_grad_()
    y_MG = grouped_mm(x_leaf, weight_leaf, counts_E)
    y_grad = torch.randn(y_MG.shape, generator=torch.Generator().manual_seed(1)).to(y_MG.dtype)
    got = (y_MG, *torch.autograd.grad(y_MG, [x_leaf, weight_leaf], y_grad))
    x_want = x_MD.detach().double().requires_grad_()
    weight_want = weight_EDG.detach().to(x_MD.dtype).double().requires_grad_()
    y_want = by_loop(x_want, weight_want, counts_E)
    want = (y_want, *torch.autograd.grad(y_want, [x_want, weight_want], y_grad.double()))
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(b.detach().abs().amax()) if b.numel() else 1.0)
        assert torch.allclose(a.double(), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17])
@pytest.mark.parametrize("width", [1, 4, 5, 8, 11])
def test_any_width_works_also_where_strides_are_no_multiple_of_16_bytes(
    dtype: torch.dtype, dim: int, width: int
) -> None:
    x_MD, weight_EDG = torch.randn(9, dim).to(dtype), torch.randn(4, dim, width).to(dtype)
    assert_equals_the_loop(x_MD, weight_EDG, COUNTS, tolerance=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 9])
def test_the_expanded_gradient_of_a_sum_works(dtype: torch.dtype, num_rows: int) -> None:
    x_MD = torch.randn(num_rows, 8, dtype=dtype, requires_grad=True)
    weight_EDG = torch.randn(4, 8, 8, dtype=dtype, requires_grad=True)
    counts_E = torch.tensor([num_rows, 0, 0, 0])
    grouped_mm(x_MD, weight_EDG, counts_E).sum().backward()
    assert weight_EDG.grad is not None
    want_DG = x_MD.detach().double().sum(dim=0).unsqueeze(1).expand(8, 8)
    assert torch.allclose(weight_EDG.grad[0].double(), want_DG, atol=0.1, rtol=0.02)


def test_the_gradient_of_one_row_with_any_stride_works() -> None:
    """A tensor of one row counts as contiguous whatever the stride of its rows; grouped_mm looks at that stride."""
    x_MD = torch.randn(1, 8, requires_grad=True)
    weight_EDG = torch.randn(2, 8, 8, requires_grad=True)
    y_MG = grouped_mm(x_MD, weight_EDG, torch.tensor([1, 0]))
    y_MG.backward(torch.ones(8).as_strided((1, 8), (0, 1)))
    assert weight_EDG.grad is not None
    assert torch.allclose(weight_EDG.grad[0], x_MD.detach().T.expand(8, 8))


@pytest.mark.parametrize("num_rows", [1, 9])
def test_a_slice_of_a_wider_tensor_works(num_rows: int) -> None:
    counts_E = torch.tensor([num_rows, 0])
    wide = torch.randn(num_rows, 13)
    assert_equals_the_loop(wide[:, :8], torch.randn(2, 8, 13)[:, :, :8], counts_E, tolerance=1e-5)


def test_transposed_rows_and_weights_work() -> None:
    x_MD, weight_EDG = torch.randn(8, 9).t(), torch.randn(4, 12, 8).transpose(1, 2)
    assert_equals_the_loop(x_MD, weight_EDG, COUNTS, tolerance=1e-5)


def test_memory_that_starts_off_a_16_byte_boundary_works() -> None:
    x_MD, weight_EDG = torch.randn(1 + 9 * 8)[1:].view(9, 8), torch.randn(3 + 4 * 64)[3:].view(4, 8, 8)
    assert x_MD.data_ptr() % 16 != 0
    assert_equals_the_loop(x_MD, weight_EDG, COUNTS, tolerance=1e-5)


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 4, 0], [4, 0, 0], [0, 0, 4], [1, 1, 1]])
def test_experts_without_rows_get_gradients_of_exactly_zero(counts: list[int]) -> None:
    x_MD = torch.randn(sum(counts), 5)
    weight_EDG = torch.randn(3, 5, 7, requires_grad=True)
    grouped_mm(x_MD, weight_EDG, torch.tensor(counts)).sum().backward()
    assert weight_EDG.grad is not None
    for count, grad_DG in zip(counts, weight_EDG.grad, strict=True):
        assert bool(grad_DG.any()) == (count > 0)
        assert grad_DG.isfinite().all()


def test_rows_past_the_last_count_reach_no_weight_and_no_other_row() -> None:
    tail_MD = torch.full((4, 8), float("nan"))
    x_MD = torch.cat([torch.randn(9, 8), tail_MD]).requires_grad_()
    weight_EDG = torch.randn(4, 8, 8, requires_grad=True)
    y_MG = grouped_mm(x_MD, weight_EDG, COUNTS)
    y_MG[:9].sum().backward()
    assert y_MG[:9].isfinite().all()
    assert weight_EDG.grad is not None
    assert x_MD.grad is not None
    assert weight_EDG.grad.isfinite().all()
    assert x_MD.grad[:9].isfinite().all()


def test_float64_is_refused_with_the_way_out() -> None:
    layer = MoE(8, 6, 4, backend="grouped_mm").double()
    with pytest.raises(ConfigError, match=r"backend='grouped_mm' cannot run here: .*float64; use backend='loop'"):
        layer(torch.randn(3, 8, dtype=torch.float64))


def test_auto_takes_another_backend_for_float64() -> None:
    layer = MoE(8, 6, 4).double()
    assert layer(torch.randn(3, 8, dtype=torch.float64)).y.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_cuda_is_refused_in_all_but_bfloat16(dtype: torch.dtype) -> None:
    experts = FFNExperts(4, 4, 2)
    assert available_backends(experts, dtype=dtype, device=torch.device("cuda"))["grouped_mm"] != ""
    assert available_backends(experts, dtype=torch.bfloat16, device=torch.device("cuda"))["grouped_mm"] == ""


@pytest.mark.parametrize("backend", ["loop", "padded_bmm", "grouped_mm"])
def test_autocast_computes_experts_in_bfloat16_and_gives_float32_gradients(backend: str) -> None:
    layer = MoE(12, 10, 4, backend=backend, bias=True, shared_hidden=6)
    x_TD = torch.randn(40, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x_TD)
    out.y.sum().backward()
    assert out.y.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    plain = layer(x_TD).y
    difference = (out.y - plain).abs().max() / plain.abs().max()
    assert 0 < difference < 2e-2


def test_mixed_dtypes_are_cast_to_that_of_the_rows() -> None:
    x_MD, weight_EDG = torch.randn(9, 8).bfloat16(), torch.randn(4, 8, 8)
    assert grouped_mm(x_MD, weight_EDG, COUNTS).dtype == torch.bfloat16
    assert_equals_the_loop(x_MD, weight_EDG, COUNTS, tolerance=2e-2)


def test_torch_still_has_grouped_mm_where_the_wrapper_looks_for_it() -> None:
    assert callable(F.grouped_mm)

"""Low precision: where it is rounded, where it is not, and how far it ends from float32."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contracts.cases import Case, Inputs, draw, error, own_selection, run_layer, simple_case, takers
from tests.contracts.dense import run_dense
from turnout import MoE, reference
from turnout.dispatch import Dropless, combine, pack, plan_dispatch, unpack
from turnout.experts import FFNExperts
from turnout.experts.activations import Activation
from turnout.routers import TopK


@pytest.mark.parametrize("kind", Activation.TABLE.names())
@pytest.mark.parametrize("backend", takers(torch.bfloat16))
@pytest.mark.parametrize("bias", [False, True])
def test_a_bfloat16_layer_is_within_two_ulp_of_float32_accumulation(backend: str, kind: str, bias: bool) -> None:
    """Rounded to bfloat16 after each matrix, nothing lost inside; ulp of the largest output."""
    for seed in range(3):
        case = simple_case(seed=seed, dim=16, hidden=24, shape=(33,), expert=kind, bias=bias, num_experts=6)
        layer, inputs = draw(case, backend=backend, dtype=torch.bfloat16)
        y_TD = layer(inputs.x.bfloat16()).y.detach()
        want_TD = rounded_reference(layer, inputs, case)
        assert y_TD.dtype == torch.bfloat16
        assert float((y_TD.double() - want_TD).abs().max()) <= 2 * ulp(float(want_TD.abs().max()))


def ulp(value: float) -> float:
    """Distance to the next bfloat16."""
    return torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(value))


def rounded_reference(layer: MoE, inputs: Inputs, case: Case) -> Tensor:
    """Each expert on each token in float32, rounded where a bfloat16 model must; summed in float64."""
    experts = layer.experts
    assert isinstance(experts, FFNExperts)
    x_TD = inputs.x.bfloat16().float()
    assignment = own_selection(layer, inputs, case.seed)
    y_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for token, expert, weight in zip(
        assignment.token_N.tolist(), assignment.expert_N.tolist(), assignment.weight_N.tolist(), strict=True
    ):
        up_1G = (x_TD[token : token + 1] @ experts.up_EDG[expert].float()).bfloat16()
        if experts.up_bias_EG is not None:
            up_1G = up_1G + experts.up_bias_EG[expert]
        h_1F = experts.activation(up_1G.float()).bfloat16().float()
        y_1D = (h_1F @ experts.down_EFD[expert].float()).bfloat16()
        if experts.down_bias_ED is not None:
            y_1D = y_1D + experts.down_bias_ED[expert]
        y_TD[token] += weight * y_1D[0].double()
    return y_TD.detach()


@pytest.mark.parametrize("backend", takers(torch.bfloat16))
def test_sums_over_many_rows_do_not_stall_in_bfloat16(backend: str) -> None:
    """In bfloat16 256 + 1 is 256: a sum kept there would stop growing at the 257th row."""
    layer = MoE(8, 8, 1, backend=backend, bias=True, expert="relu").bfloat16()
    out = layer(torch.ones(4096, 8, dtype=torch.bfloat16))
    out.y.sum().backward()
    experts = layer.experts
    assert isinstance(experts, FFNExperts)
    assert experts.down_bias_ED is not None
    assert experts.down_bias_ED.grad is not None
    assert torch.equal(experts.down_bias_ED.grad.float(), torch.full((1, 8), 4096.0))


def test_many_choices_are_summed_in_float32_and_rounded_once() -> None:
    """The error of the sum does not grow with the number of choices."""
    num_tokens, k = 20, 64
    assignment = TopK(k=k).build(4, k)(torch.randn(num_tokens, 4)).assignment
    plan = plan_dispatch(assignment, Dropless().admit(assignment))
    y_MD = torch.randn(num_tokens * k, 6).bfloat16()
    weighted_MD = assignment.weight_N[plan.assignment_M].unsqueeze(1).double() * y_MD.double()
    want_TD = torch.zeros(num_tokens, 6, dtype=torch.float64).index_add(0, plan.token_M, weighted_MD)
    got_TD = combine(y_MD, assignment, plan).double()
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((got_TD - want_TD).abs() <= half_ulp * want_TD.abs() + 1e-6).all())


def test_the_gradient_of_a_token_with_many_choices_does_not_stall_in_bfloat16() -> None:
    """256 + 1 is 256 in bfloat16."""
    assignment = TopK(k=512).build(4, 512)(torch.ones(1, 4)).assignment
    plan = plan_dispatch(assignment, Dropless().admit(assignment))
    x_TD = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = pack(x_TD, plan, layout="ragged")
    unpack(rows, plan).sum().backward()
    assert x_TD.grad is not None
    assert torch.equal(x_TD.grad.float(), torch.full((1, 4), 512.0))


@pytest.mark.parametrize("backend", takers(torch.bfloat16))
def test_float64_stays_float64_under_autocast(backend: str) -> None:
    """torch's own autocast leaves float64 alone."""
    if backend not in takers(torch.float64):
        backend = "auto"
    layer, inputs = draw(simple_case(shared_hidden=4), backend=backend)
    plain, _ = run_layer(layer, inputs, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = run_layer(layer, inputs, 0)
    assert torch.equal(cast.y, plain.y)


def test_the_dtype_of_y_is_that_of_x() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = MoE(8, 6, 4, capacity=Dropless(), shared_hidden=3).to(dtype)
        out = layer(torch.randn(5, 8).to(dtype))
        assert out.y.dtype == dtype
        assert all(term.value.dtype == torch.promote_types(dtype, torch.float32) for term in out.losses)


def test_the_layer_passes_gradcheck() -> None:
    """The four functions with a backward of their own, together, against finite differences."""
    for backend in ("loop", "padded_bmm"):
        for kind in Activation.TABLE.names():
            case = simple_case(shape=(4,), dim=3, hidden=2, num_experts=3, expert=kind, shared_hidden=2, padding=0.3)
            layer, inputs = draw(case, backend=backend)
            names = [name for name, _ in layer.named_parameters()]

            def outputs(
                x: Tensor,
                *values: Tensor,
                layer: MoE = layer,
                names: list[str] = names,
                mask: Tensor | None = inputs.mask,
            ) -> tuple[Tensor, ...]:
                parameters = dict(zip(names, values, strict=True))
                out = torch.func.functional_call(layer, parameters, (x,), {"mask": mask})
                return (out.y, *(term.value for term in out.losses))

            # a zero token ties all experts, and a finite difference would change its choice
            leaves = [inputs.x + 0.05, *inputs.parameters.values()]
            assert torch.autograd.gradcheck(outputs, [leaf.clone().requires_grad_() for leaf in leaves], fast_mode=True)


def test_the_oracle_itself_passes_gradcheck() -> None:
    logits_TE = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for activation in ("softmax", "sigmoid"):
        for renormalize in (False, True):
            expert_TK = reference.best_experts(logits_TE, 2)
            assert torch.autograd.gradcheck(
                lambda value, chosen=expert_TK, name=activation, renorm=renormalize: reference.topk_gates(
                    value, chosen, activation=name, renormalize=renorm
                ),
                [logits_TE],
            )
    assert torch.autograd.gradcheck(reference.z_loss, [logits_TE])


@pytest.mark.parametrize("backend", takers(torch.bfloat16))
def test_bfloat16_gradients_are_near_those_of_the_oracle(backend: str) -> None:
    """Within a few roundings of the largest; a gradient summed in bfloat16 or scaled wrongly would be far off."""
    for seed in range(8):
        case = simple_case(seed=seed, shape=(6, 40), router=TopK(k=2), bias=True, shared_hidden=6)
        layer, inputs = draw(case, backend=backend, dtype=torch.bfloat16)
        rounded = {name: value.bfloat16().double() for name, value in inputs.parameters.items()}
        inputs = replace(
            inputs, x=inputs.x.bfloat16().double(), y_grad=inputs.y_grad.bfloat16().double(), parameters=rounded
        )
        got, _ = run_layer(layer, inputs, seed)
        want = run_dense(case, inputs, layer, selection=own_selection(layer, inputs, seed))
        for name, grad in want.grads.items():
            found = got.grads[name]
            assert found is not None
            assert grad is not None
            assert error(found, grad) < 0.03, name


@pytest.mark.parametrize("latent_dim", [0, 4])
def test_a_bfloat16_layer_takes_float32_tokens_with_a_shared_expert_as_without(latent_dim: int) -> None:
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, shared_hidden=16, bias=True, latent_dim=latent_dim).to(torch.bfloat16)
    wide = MoE(8, 16, 4, shared_hidden=16, bias=True, latent_dim=latent_dim)
    wide.load_state_dict(layer.state_dict())
    x_TD = torch.randn(9, 8)
    assert layer(x_TD).y.dtype == torch.float32
    # the weights are the same numbers, and follow the tokens' dtype; what multiplies them may be another unit
    want_TD = wide(x_TD).y
    assert (layer(x_TD).y - want_TD).abs().max() < 1e-6 * want_TD.abs().max()

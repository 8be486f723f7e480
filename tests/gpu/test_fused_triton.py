"""The Triton kernels against the oracle: what a routing can do to them, on a GPU or in the interpreter."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contracts.test_fused_cpu import all_to_one, assignment_of, drawn, drawn_experts, run
from turnout import MoE
from turnout.bench import experts_race
from turnout.contracts import ExpertBackend
from turnout.dispatch import LocalDispatcher
from turnout.errors import ConfigError
from turnout.experts import FFNExperts, choose_backend, fused_triton_op
from turnout.kernels import KINDS
from turnout.kernels.gpu import configs, proof, trust, tuned
from turnout.kernels.gpu.configs import Config
from turnout.layers.expert_pass import pass_experts
from turnout.routers import ExpertChoice, TopK
from turnout.tensors import Admission, Assignment

TRITON = ExpertBackend.TABLE["fused_triton"]
EVERYTHING = Admission(keep_N=None, capacity=None, dropped_E={})


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that leave little to do: a program takes the interpreter some milliseconds, whatever it computes."""
    monkeypatch.setattr(fused_triton_op, "config_for", lambda shape, size: proof.CONFIG)


def to(assignment: Assignment, device: torch.device) -> Assignment:
    moved = {name: getattr(assignment, name).to(device) for name in ("token_N", "expert_N", "choice_N")}
    weight_N = assignment.weight_N.detach().to(device).requires_grad_()
    return Assignment(
        **moved,
        weight_N=weight_N,
        num_tokens=assignment.num_tokens,
        num_experts=assignment.num_experts,
        top_k=assignment.top_k,
    )


def side_by_side(num_tokens: int, num_experts: int, k: int) -> Assignment:
    """k choices of each token, next to each other: what top-k routers give."""
    found = drawn(num_tokens, num_experts, k)
    return Assignment(
        token_N=found.token_N,
        expert_N=found.expert_N,
        weight_N=found.weight_N,
        choice_N=found.choice_N,
        num_tokens=num_tokens,
        num_experts=num_experts,
        top_k=k,
    )


def wide(experts: FFNExperts) -> FFNExperts:
    """The same weights in float64."""
    bias = experts.up_bias_EG is not None
    copy = FFNExperts(experts.dim, experts.hidden, experts.num_experts, kind=experts.kind, bias=bias).double()
    copy.load_state_dict(experts.state_dict())
    return copy


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Of each tensor, relative to the largest value or 1."""
    assert [a.shape for a in got] == [b.shape for b in want]
    scales = [max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0 for b in want]
    return [
        float((a.detach().cpu().double() - b.detach()).abs().max()) / scale if b.numel() else 0.0
        for a, b, scale in zip(got, want, scales, strict=True)
    ]


def assert_equals_the_loop(
    device: torch.device,
    experts: FFNExperts,
    num_tokens: int,
    assignment: Assignment,
    *,
    keep_N: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> list[Tensor]:
    """Against float64 on the same rounded numbers, forward and backward; and forward alone, as in inference."""
    x_TD = torch.randn(num_tokens, experts.dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts = experts.to(dtype)
    want = run("loop", wide(experts), x_TD.double(), assignment, keep_N)
    own, kept = to(assignment, device), None if keep_N is None else keep_N.to(device)
    experts = experts.to(device)
    got = run("fused_triton", experts, x_TD.to(device), own, kept)
    assert [a.dtype for a in got] == [dtype, dtype, torch.float32, *[dtype] * (len(got) - 3)]
    with torch.no_grad():
        admission = Admission(keep_N=kept, capacity=None, dropped_E={})
        inferred = pass_experts(experts, TRITON, x_TD.to(device), own, admission, dispatcher=LocalDispatcher())
    assert torch.equal(inferred, got[0])
    found = errors(got, want)
    assert max(found) < tolerance, found
    return got


def with_config(config: Config, monkeypatch: pytest.MonkeyPatch, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `compute` gives when the kernels are launched with that config."""
    with monkeypatch.context() as patched:
        patched.setattr(fused_triton_op, "config_for", lambda shape, size: config)
        return compute()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_the_oracle_with_and_without_bias(kind: str, device: torch.device) -> None:
    for bias in (False, True):
        assert_equals_the_loop(device, drawn_experts(20, 12, 3, kind=kind, bias=bias), 21, side_by_side(21, 3, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
def test_two_bytes_are_as_near_as_the_loop_in_two_bytes(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    experts, assignment = drawn_experts(33, 40, 2, bias=True), side_by_side(40, 2, 2)
    got = assert_equals_the_loop(device, experts, 40, assignment, dtype=dtype, tolerance=tolerance)
    experts = experts.to("cpu", dtype)
    x_TD = torch.randn(40, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = run("loop", wide(experts), x_TD.double(), assignment)
    theirs = errors(run("loop", experts, x_TD, assignment), want)
    ours = errors(got, want)
    unit = torch.finfo(dtype).eps
    assert all(own < 1.5 * other + unit for own, other in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize(("num_tokens", "k"), [(0, 2), (1, 1), (1, 3), (257, 1), (130, 2)])
def test_any_number_of_tokens_works(num_tokens: int, k: int, device: torch.device) -> None:
    assert_equals_the_loop(device, drawn_experts(18, 10, 3, bias=True), num_tokens, side_by_side(num_tokens, 3, k))


@pytest.mark.parametrize("name", ["MANY_ROWS", "SOME_ROWS", "FEW_ROWS", "WIDE_MANY"])
def test_tiles_as_on_a_gpu_compute_the_same(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, assignment = drawn_experts(72, 40, 2, bias=True), side_by_side(19, 2, 2)
    rest = {} if name == "WIDE_MANY" else {"dtype": torch.bfloat16, "tolerance": 2e-2}
    for config in {taken.boxed: taken for taken in reversed(getattr(configs, name))}.values():
        with_config(config, monkeypatch, lambda: assert_equals_the_loop(device, experts, 19, assignment, **rest))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize(("dim", "hidden"), [(40, 72), (32, 64), (20, 12)])
def test_fetched_blocks_and_persistent_programs_compute_the_same(
    kind: str, dim: int, hidden: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths that blocks divide and that they do not; 12 are no 16 bytes' multiple in bfloat16, so nothing is boxed."""
    experts, assignment = drawn_experts(dim, hidden, 4, kind=kind, bias=True), all_to_one(150, 4)
    for assigned in (assignment, side_by_side(150, 4, 2)):
        compute = partial(assert_equals_the_loop, device, experts, 150, assigned)
        want = with_config(proof.CONFIG, monkeypatch, compute)
        assert all(map(torch.equal, with_config(proof.FETCHED, monkeypatch, compute), want))
    with_config(
        proof.FETCHED,
        monkeypatch,
        lambda: assert_equals_the_loop(device, experts, 150, assignment, dtype=torch.bfloat16, tolerance=2e-2),
    )


def test_a_nan_of_one_expert_reaches_no_other_through_fetched_blocks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, assignment = drawn_experts(40, 72, 3), to(side_by_side(60, 3, 1), device)
    with torch.no_grad():
        for weight in experts.parameters():
            weight[1] = float("nan")
    x_TD = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    got = with_config(
        proof.FETCHED, monkeypatch, lambda: run("fused_triton", experts.to(device), x_TD.to(device), assignment)
    )
    is_second = assignment.expert_N == 1
    assert is_second.any()
    for rows in got[:3]:
        assert rows[is_second].isnan().all()
        assert not rows[~is_second].isnan().any()
    for grad_E in got[3:]:
        assert not grad_E[[0, 2]].isnan().any()


def test_eight_choices_and_a_width_of_one_work(device: torch.device) -> None:
    assert_equals_the_loop(device, drawn_experts(1, 1, 9, kind="gelu", bias=True), 5, side_by_side(5, 9, 8))


def test_experts_without_rows_get_gradients_of_exactly_zero(device: torch.device) -> None:
    got = assert_equals_the_loop(device, drawn_experts(20, 24, 3, bias=True), 150, all_to_one(150, 3))
    for grad in got[3:]:
        assert not grad[:2].any()
        assert grad[2].any()


def test_dropped_assignments_have_no_row_and_no_gradient(device: torch.device) -> None:
    assignment = side_by_side(40, 4, 2)
    keep_N = torch.rand(80, generator=torch.Generator().manual_seed(3)) < 0.5
    y_TD, _, weight_grad_N, *_ = assert_equals_the_loop(device, drawn_experts(20, 12, 4), 40, assignment, keep_N=keep_N)
    assert not weight_grad_N[~keep_N].any()
    assert not y_TD[~keep_N.view(40, 2).any(dim=1)].any()


@pytest.mark.parametrize("num", [60, 300])
def test_rows_of_a_token_in_any_order_and_number_work(num: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    expert_N, token_N = (torch.randint(most, (num,), generator=generator) for most in (4, 30))
    assignment = assignment_of(expert_N, token_N, num_tokens=33, num_experts=4)
    assert_equals_the_loop(device, drawn_experts(24, 17, 4), 33, assignment)


def layers(device: torch.device, router: TopK | ExpertChoice) -> tuple[MoE, MoE]:
    torch.manual_seed(0)
    reference = MoE(20, 12, 3, router=router, backend="loop").double()
    layer = MoE(20, 12, 3, router=router, backend="fused_triton").to(device)
    layer.load_state_dict(reference.state_dict())
    return layer, reference


@pytest.mark.parametrize("router", [TopK(k=2), ExpertChoice()], ids=["topk", "expert_choice"])
def test_a_padded_layer_equals_the_loop_with_its_router(router: TopK | ExpertChoice, device: torch.device) -> None:
    """By name, so after the proof that a device is asked for."""
    layer, reference = layers(device, router)
    x = torch.randn(2, 11, 20, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(3)) < 0.7
    results = []
    for module, value in ((layer, x.to(device)), (reference, x.double())):
        leaf = value.requires_grad_()
        y = module(leaf, mask=mask.to(value.device)).y
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])])
    assert max(errors(*results)) < 1e-5
    assert not results[0][0][~mask.to(device)].any()


def test_torch_compile_takes_choice_and_pass_in_one_graph(device: torch.device) -> None:
    experts, assignment = drawn_experts(20, 12, 3, bias=True).to(device), to(side_by_side(9, 3, 2), device)

    def graph(x_TD: Tensor, weight_N: Tensor) -> Tensor:
        backend = choose_backend(experts, "fused_triton", dtype=x_TD.dtype, device=x_TD.device)
        own = Assignment(
            token_N=assignment.token_N,
            expert_N=assignment.expert_N,
            weight_N=weight_N,
            choice_N=assignment.choice_N,
            num_tokens=9,
            num_experts=3,
            top_k=2,
        )
        return pass_experts(experts, backend, x_TD, own, EVERYTHING, dispatcher=LocalDispatcher())

    results = []
    for function in (graph, torch.compile(graph, backend="aot_eager", fullgraph=True)):
        x_TD = torch.randn(9, 20, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
        y_TD = function(x_TD, assignment.weight_N)
        leaves = [x_TD, assignment.weight_N, *experts.parameters()]
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("top_k", [0, 2])
def test_the_operator_is_what_its_fake_says(top_k: int, device: torch.device) -> None:
    assignment = to(side_by_side(7, 3, 2), device)
    experts = drawn_experts(20, 12, 3, bias=True).to(device)
    x_TD = torch.randn(7, 20, device=device, requires_grad=True)
    inputs = (x_TD, assignment.weight_N, *experts.parameters(), assignment.token_N, assignment.expert_N, None, None)
    torch.library.opcheck(
        fused_triton_op.triton_experts,
        (*inputs, "swiglu", top_k, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_only_what_is_wanted_is_computed(device: torch.device) -> None:
    experts = drawn_experts(20, 12, 3).requires_grad_(False).to(device)
    assignment = to(side_by_side(9, 3, 2), device)
    x_TD = torch.randn(9, 20, device=device, requires_grad=True)
    pass_experts(experts, TRITON, x_TD, assignment, EVERYTHING, dispatcher=LocalDispatcher()).sum().backward()
    assert x_TD.grad is not None
    assert all(parameter.grad is None for parameter in experts.parameters())
    y_TD = pass_experts(
        experts.requires_grad_(True), TRITON, x_TD.detach(), assignment, EVERYTHING, dispatcher=LocalDispatcher()
    )
    y_TD.sum().backward()
    assert experts.up_EDG.grad is not None


def test_second_derivatives_are_refused(device: torch.device) -> None:
    experts, assignment = drawn_experts(20, 12, 3).to(device), to(side_by_side(3, 3, 1), device)
    x_TD = torch.randn(3, 20, device=device, requires_grad=True)
    y_TD = pass_experts(experts, TRITON, x_TD, assignment, EVERYTHING, dispatcher=LocalDispatcher())
    with pytest.raises(ConfigError, match=r"create_graph=True: the layers have no second derivatives"):
        torch.autograd.grad(y_TD.sum(), x_TD, create_graph=True)


def test_an_assignment_to_what_does_not_exist_stops_the_process_or_the_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("a device-side assertion ends the device's use in this process")
    index_N, wrong_N = torch.tensor([0, 1]), torch.tensor([0, 2])
    for expert_N, token_N in ((wrong_N, index_N), (index_N, wrong_N)):
        assignment = assignment_of(expert_N, token_N, num_tokens=2, num_experts=2)
        with pytest.raises(RuntimeError, match="single nonzero value"):
            run("fused_triton", drawn_experts(4, 4, 2), torch.randn(2, 4), assignment)


def test_kernels_that_are_wrong_are_not_trusted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    right = proof.launch.backward
    monkeypatch.setattr(proof, "SIZES", proof.SIZES[-1:])

    def wrong(*args, **kwargs):
        grads = right(*args, **kwargs)
        return grads._replace(weight_N=grads.weight_N * 1.001)

    monkeypatch.setattr(proof.launch, "backward", wrong)
    assert proof.prove("relu", torch.float32, device).startswith("Triton's kernels are off the oracle by ")
    nan = torch.tensor(torch.nan)
    monkeypatch.setattr(proof.launch, "backward", lambda *a, **k: right(*a, **k)._replace(weight_N=nan))
    assert proof.prove("relu", torch.float32, device).startswith("Triton's kernels are off the oracle by nan")

    def broken(*args, **kwargs):
        raise OSError("no C compiler")

    monkeypatch.setattr(proof.launch, "backward", broken)
    assert proof.prove("relu", torch.float32, device) == "Triton's kernels do not run here: OSError: no C compiler"


def test_a_proof_that_succeeded_is_kept_till_what_it_was_proven_with_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURNOUT_KERNELS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    answers = iter(("wrong", "", "wrong of another kind", "", "wrong elsewhere"))
    said = partial(trust.once_on, torch.device("cuda"), lambda *given: next(answers), "some")
    assert [said("gelu") for _ in range(3)] == ["wrong", "", ""]
    assert [said("relu") for _ in range(3)] == ["wrong of another kind", "", ""]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert said("gelu") == "wrong elsewhere"


def test_a_race_keeps_the_fastest_config_and_who_won(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TURNOUT_CACHE", str(tmp_path))
    monkeypatch.setattr(fused_triton_op, "config_for", tuned.config_for)
    slow, fast = proof.CONFIG, replace(proof.CONFIG, group=2)
    for module in (tuned, experts_race):
        monkeypatch.setattr(module, "candidates_for", lambda shape, size: (slow, fast))
    times = iter((3.0, 1.0))

    def medians(steps: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
        for step in steps.values():
            step()
        return {name: next(times) if name == "" else float(len(name)) for name in steps}

    monkeypatch.setattr(experts_race, "medians", medians)
    experts = drawn_experts(20, 12, 3).to(device)
    race = experts_race.race_experts(experts, num_tokens=9, top_k=2, dtype=torch.float32)
    assert (race.config, race.config_ms, race.ms) == (fast, (3.0, 1.0), 12.0)
    shape = tuned.shape_of((3, 12, 20), "swiglu", device, torch.float32)
    assert tuned.config_for(shape, tuned.size_of(18)) == fast
    assert f"12 ms against {len(race.rival)} of {race.rival}" in tuned.race_failure(shape)
    tuned.config_for.cache_clear()


def test_auto_does_not_take_what_never_raced(device: torch.device) -> None:
    chosen = choose_backend(FFNExperts(20, 12, 3), "auto", dtype=torch.float32, device=device)
    assert chosen is not TRITON


def test_a_config_comes_back_from_json_as_it_was() -> None:
    for config in (*configs.MANY_ROWS, *configs.FEW_ROWS):
        assert Config.of_list(config.as_list()) == config

"""Every launch of the layers of docs/gpu.md, compiled for compute capability 9.0 where there need be no GPU."""

import importlib
import importlib.util
import os
import re
from typing import Any

import pytest
import torch

from turnout.kernels import Weights
from turnout.kernels.gpu import chooser, codes_launcher, configs, launcher
from turnout.kernels.gpu.configs import CodesConfig, Config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
    ),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

LAYERS = {"mixtral": (4096, 14336, 8, 2), "fine-grained": (2048, 1024, 128, 8)}  # D, F, E and choices
MOST_SHARED = 227 << 10  # bytes a program may have there
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
PRODUCTS = {"up_kernel", "rows_kernel", "hidden_grad_kernel", "matrix_grad_kernel"}
OPTIONS = {"num_warps", "num_stages"}

Built = dict[tuple[str, str], Any]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """What was launched, compiled and not run: by name and by all that the compiler knew of it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found: Built = {}

    def type_of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, int | float):
            return "i32" if isinstance(value, int) else "fp32"
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS & named.keys()}
        values = {**dict(zip(self.arg_names, args, strict=False)), **named}
        constants = {
            name for name, parameter in zip(self.arg_names, self.params, strict=True) if parameter.is_constexpr
        }
        types = {name: "constexpr" if name in constants else type_of(values[name]) for name in self.arg_names}
        place = {name: (index,) for index, name in enumerate(self.arg_names)}
        source = ASTSource(
            fn=self,
            signature=types,
            constexprs={place[name]: values[name] for name in constants},
            attrs={place[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")},
        )
        found[self.__name__, repr(sorted({**types, **options, **named}.items()))] = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options=options
        )

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    return found


def launch_all(name: str, config: Config, *, num_tokens: int, train: bool) -> None:
    """Forward and backward on tensors without numbers."""
    dim, hidden, num_experts, top_k = LAYERS[name]
    with torch.device("meta"):
        x_TD = torch.empty(num_tokens, dim, dtype=torch.bfloat16)
        up_EDG = torch.empty(num_experts, dim, 2 * hidden, dtype=torch.bfloat16)
        down_EFD = torch.empty(num_experts, hidden, dim, dtype=torch.bfloat16)
        weight_N, index_N = torch.empty(num_tokens * top_k), torch.empty(num_tokens * top_k, dtype=torch.int64)
    weights = Weights(up_EDG=up_EDG, down_EFD=down_EFD, up_bias_EG=None, down_bias_ED=None, kind="swiglu")
    y_TD, up_MG, routes = launcher().forward(
        x_TD, weight_N, index_N, index_N, None, weights, config, top_k=top_k, keep=train
    )
    if train:
        rest = (weights, routes, up_MG, config)
        wanted = (True, True, True, True, False, False)
        launcher().backward(y_TD, x_TD, weight_N, index_N, *rest, top_k=top_k, wanted=wanted)


@pytest.mark.parametrize(
    ("layer", "config"),
    [("mixtral", config) for config in configs.MANY_ROWS] + [("fine-grained", config) for config in configs.SOME_ROWS],
)
def test_every_product_is_by_matrix_units_and_fits(layer: str, config: Config, built: Built) -> None:
    launch_all(layer, config, num_tokens=4096, train=True)
    assert {kernel for kernel, _ in built} >= PRODUCTS
    for (kernel, _), compiled in built.items():
        ptx = compiled.asm["ptx"]
        assert compiled.metadata.shared <= MOST_SHARED, (kernel, compiled.metadata.shared)
        if kernel in PRODUCTS:
            assert "wgmma.mma_async" in ptx, kernel
            is_boxed = config.boxed and kernel != "matrix_grad_kernel"
            assert bool(re.search(r"cp\.async\.bulk\.tensor", ptx)) == is_boxed, kernel


@pytest.mark.parametrize("config", configs.FEW_ROWS)
def test_few_rows_fit_too(config: Config, built: Built) -> None:
    launch_all("fine-grained", config, num_tokens=16, train=False)
    assert {"up_kernel", "rows_kernel", "combine_kernel"} <= {kernel for kernel, _ in built}
    assert all(compiled.metadata.shared <= MOST_SHARED for compiled in built.values())


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_routers_kernels_compile_and_hold_a_row_in_registers(layer: str, sigmoid: bool, built: Built) -> None:
    _, _, num_experts, top_k = LAYERS[layer]
    with torch.device("meta"):
        logits_RE, token_R = torch.empty(4096, num_experts), torch.empty(4096, dtype=torch.int64)
        weight_N = torch.empty(4096 * top_k)
    gate = chooser().Gate(k=top_k, sigmoid=sigmoid, renormalize=True, scale=1.0)
    chosen, count_BE = chooser().choose(logits_RE, token_R, logits_RE[0] if sigmoid else None, gate)
    chooser().choose_backward(logits_RE, *chosen[:3], chosen.scores_RE, weight_N, gate)
    order = importlib.import_module("turnout.kernels.gpu.order")
    rest = {"num_tokens": 4096, "num_experts": num_experts, "rows": 128, "top_k": top_k}
    order.sort(chosen.expert_N, chosen.token_N, None, **rest, count_BE=count_BE)
    names = {kernel for kernel, _ in built}
    assert names == {"choose_kernel", "choose_grad_kernel", "before_kernel", "start_kernel", "counted_kernel"}
    for (kernel, _), compiled in built.items():
        assert compiled.metadata.shared <= 8 << 10, (kernel, compiled.metadata.shared)


def launch_codes(name: str, config: CodesConfig, *, num_tokens: int) -> None:
    """A pass of codes on tensors without numbers."""
    dim, hidden, num_experts, top_k = LAYERS[name]
    with torch.device("meta"):
        x_TD = torch.empty(num_tokens, dim, dtype=torch.bfloat16)
        codes = codes_launcher().Codes(
            up_EPFD=torch.empty(num_experts, 2, hidden, dim, dtype=torch.float8_e4m3fn),
            up_scales=torch.empty(num_experts, 2, hidden // 128, dim // 128),
            down_EDF=torch.empty(num_experts, dim, hidden, dtype=torch.float8_e4m3fn),
            down_scales=torch.empty(num_experts, dim // 128, hidden // 128),
            up_bias_EG=None,
            down_bias_ED=None,
            kind="swiglu",
        )
        weight_N, index_N = torch.empty(num_tokens * top_k), torch.empty(num_tokens * top_k, dtype=torch.int64)
    codes_launcher().forward(x_TD, weight_N, index_N, index_N, None, codes, config, top_k=top_k)


@pytest.mark.parametrize(
    ("layer", "config"),
    [("mixtral", config) for config in configs.CODES_MANY]
    + [("fine-grained", config) for config in configs.CODES_SOME],
)
def test_codes_are_multiplied_by_matrix_units_as_they_are(layer: str, config: CodesConfig, built: Built) -> None:
    launch_codes(layer, config, num_tokens=4096)
    names = {kernel for kernel, _ in built}
    assert names >= {"round_kernel", "up_codes_kernel", "down_codes_kernel", "combine_kernel"}
    for (kernel, _), compiled in built.items():
        ptx = compiled.asm["ptx"]
        assert compiled.metadata.shared <= MOST_SHARED, (kernel, compiled.metadata.shared)
        if kernel in ("up_codes_kernel", "down_codes_kernel"):
            assert re.search(r"wgmma\.mma_async[\w.]*\.f32\.e4m3\.e4m3", ptx), kernel
            assert bool(re.search(r"cp\.async\.bulk\.tensor", ptx)) == config.boxed, kernel
            # all stages but the one that is multiplied are under way
            tile = config.up if kernel == "up_codes_kernel" else config.down
            one_step = _step_bytes(config, kernel)
            assert compiled.metadata.shared >= (tile.stages - 1) * one_step, (kernel, compiled.metadata.shared)
        if kernel == "round_kernel":
            assert "cvt.rn.satfinite.e4m3x2" in ptx


def _step_bytes(config: CodesConfig, kernel: str) -> int:
    """Of the rows and of one block of the matrix or matrices."""
    if kernel == "up_codes_kernel":
        return (config.rows + 2 * config.up.columns) * 128
    return (config.rows + config.down.columns) * config.up.columns


@pytest.mark.parametrize("config", configs.CODES_FEW)
def test_few_rows_of_codes_fit_too(config: CodesConfig, built: Built) -> None:
    launch_codes("fine-grained", config, num_tokens=16)
    assert {"up_codes_kernel", "down_codes_kernel"} <= {kernel for kernel, _ in built}
    assert all(compiled.metadata.shared <= MOST_SHARED for compiled in built.values())

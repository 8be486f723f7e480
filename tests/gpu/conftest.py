"""The same tests on a GPU, or in Triton's interpreter on the CPU: a process whose TRITON_INTERPRET is 1 from its start.

Triton asks for that variable as it is imported, so test_interpreter.py starts such a process for itself.
"""

import os
from typing import Any

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WITH_KERNELS = ["test_fused_fp8.py", "test_fused_triton.py", "test_triton_gates.py"]
collect_ignore = [] if INTERPRETING or torch.cuda.is_available() else WITH_KERNELS

if INTERPRETING:
    from triton.runtime import interpreter

    class _Patched:
        def restore(self) -> None:
            pass

    _patch_tensor, _patch = interpreter._patch_lang_tensor, interpreter._patch_lang
    _seen: set[str] = set()

    def _patch_lang_tensor(tensor: type, scope: object) -> None:
        """Triton 3.6 makes an index of an array of one axis, which numpy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    def _patch_lang(function: object) -> _Patched:
        """Once for each module and never back: for each call of each function it takes half of the time."""
        module = function.__globals__["__name__"]  # type: ignore[attr-defined]
        if module not in _seen:
            _seen.add(module)
            _patch(function)
        return _Patched()

    _convert = interpreter._convert_float

    def _convert_float(values: Any, source: Any, target: Any, rounding: object) -> Any:
        """Triton 3.6 loses the carry where it rounds to e4m3, and has no NaN in it; a GPU does as torch does."""
        names = (source.name, target.name)
        if names == ("fp32", "fp8e4nv"):
            wide = torch.from_numpy(values.view("float32").copy()).clamp(-448, 448)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if names == ("fp8e4nv", "fp32"):
            wide = torch.from_numpy(values.view("uint8").copy()).view(torch.float8_e4m3fn).float()
            return wide.view(torch.int32).numpy()
        return _convert(values, source, target, rounding)

    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_lang_tensor, _patch_lang
    # an addition of indices would be done twice, once in 64 bits
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels compute in this process."""
    return torch.device("cpu" if INTERPRETING else "cuda")

"""The same tests on a GPU, or in Triton's interpreter on the CPU: a process whose TRITON_INTERPRET is 1 from its start.

Triton asks for that variable as it is imported, so test_interpreter.py starts such a process for itself.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WITH_KERNELS = ["test_fused_triton.py", "test_triton_gates.py"]
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

    interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_lang_tensor, _patch_lang
    # an addition of indices would be done twice, once in 64 bits
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


@pytest.fixture
def device() -> torch.device:
    """Where the kernels compute in this process."""
    return torch.device("cpu" if INTERPRETING else "cuda")

"""Does what was loaded fit what is there? Every difference in one error, before anything is changed."""

from collections.abc import Callable, Mapping

from torch import Tensor

from turnout.errors import CheckpointError
from turnout.registry import nearest

_SHOWN = 8  # differences listed of each kind


def check_fits(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor], *, what: str = "model") -> None:
    """Compare names, shapes and dtypes of a model's state with those of a checkpoint file.

    Raises: CheckpointError that lists missing, unexpected and differing tensors, with the nearest names.
    """
    check_same({n: _form(t) for n, t in expected.items()}, {n: _form(t) for n, t in loaded.items()}, what)


def check_same(expected: Mapping[str, str], found: Mapping[str, str], what: str) -> None:
    """The same for a word per name, such as its shape.

    Raises: CheckpointError.
    """
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    differing = [name for name in expected if name in found and expected[name] != found[name]]
    if not (missing or unexpected or differing):
        return
    lines = [
        *_some(missing, lambda n: f"missing in the checkpoint: {n}{nearest(n, unexpected)}"),
        *_some(unexpected, lambda n: f"only in the checkpoint: {n}{nearest(n, missing)}"),
        *_some(differing, lambda n: f"differs: {n} is {found[n]} in the checkpoint, {expected[n]} here"),
    ]
    raise CheckpointError(
        f"the checkpoint's {what} does not fit ({len(missing)} missing, {len(unexpected)} unexpected, "
        f"{len(differing)} differing); use the recipe of the run that saved it\n  " + "\n  ".join(lines)
    )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str], line: Callable[[str], str]) -> list[str]:
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [line(name) for name in names[:_SHOWN]] + more

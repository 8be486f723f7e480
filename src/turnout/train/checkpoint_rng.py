"""The state of the process's random number generators as tensors and JSON, without pickle."""

import random
from typing import Any

import numpy as np
import torch

from turnout.errors import CheckpointError
from turnout.train.checkpoint_tensors import FlatState


def rng_state() -> FlatState:
    """The global generators of torch (CPU, and each CUDA device once CUDA is in use), numpy and `random`.

    Generators that objects own (torch.Generator, numpy's default_rng) are saved by their owners.
    """
    version, words, gauss_next = random.getstate()
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # pyright: ignore[reportAssignmentType]
    tensors = {
        "torch_cpu": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"torch_cuda_{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    meta = {
        "python": {"version": version, "gauss_next": gauss_next},
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    return FlatState(tensors=tensors, meta=meta)


def set_rng_state(state: FlatState) -> tuple[str, ...]:
    """Restore what `rng_state` gave; returns notes on saved CUDA devices that this machine lacks.

    Raises: CheckpointError if a generator's state is missing or of another kind.
    """
    tensors, meta = state.tensors, state.meta
    try:
        random.setstate((meta["python"]["version"], tuple(tensors["python"].tolist()), meta["python"]["gauss_next"]))
        key = tensors["numpy"].cpu().numpy().astype(np.uint32)
        inner = {"key": key, "pos": meta["numpy"]["pos"]}
        np.random.set_state({**meta["numpy"], "state": inner})
        torch.set_rng_state(tensors["torch_cpu"].cpu())
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random state cannot be restored: {error!r}") from error
    return _set_cuda_states(state)


def _set_cuda_states(state: FlatState) -> tuple[str, ...]:
    saved = sum(name.startswith("torch_cuda_") for name in state.tensors)
    present = torch.cuda.device_count()
    for device in range(min(saved, present)):
        torch.cuda.set_rng_state(state.tensors[f"torch_cuda_{device}"].cpu(), device)
    if saved > present:
        return (f"the random state of {saved - present} CUDA devices is not restored: this machine has {present}",)
    return ()

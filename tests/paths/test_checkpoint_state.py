"""Optimizer and random state come back bit for bit, by name and without pickle."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from turnout.errors import CheckpointError
from turnout.train.checkpoint import load, save
from turnout.train.checkpoint_optimizer import optimizer_state, set_optimizer_state
from turnout.train.checkpoint_rng import rng_state, set_rng_state
from turnout.train.checkpoint_tensors import FlatState

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "sgd momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda params: optim.AdamW(params, lr=3e-4, betas=(0.9, 0.95)),
    "adamw fused": lambda params: optim.AdamW(params, lr=3e-4, fused=True),
    "adam amsgrad": lambda params: optim.Adam(params, lr=torch.tensor(1e-3), amsgrad=True),
    "adafactor": lambda params: optim.Adafactor(params, lr=1e-2),
    "rmsprop": lambda params: optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda params: optim.Adagrad(params, lr=1e-2),
}


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(net: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        x_BD = torch.randn(4, 5, dtype=next(net.parameters()).dtype)
        net(x_BD).square().sum().backward()
        optimizer.step()


def through_disk(state: FlatState, run: Path) -> FlatState:
    loaded = load(save(run, 1, {"o": state.tensors}, {"o": state.meta}, keep_last=1))
    return FlatState(tensors=loaded.files["o"], meta=loaded.meta["o"])


def by_name(optimizer: optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    return optimizer_state(optimizer, net.named_parameters()).tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit_even_with_parameters_in_another_order(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    net = model(dtype=dtype)
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, 3)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    state = through_disk(optimizer_state(optimizer, net.named_parameters()), tmp_path)
    other = model(1, dtype)
    other.load_state_dict(net.state_dict())
    resumed = OPTIMIZERS[name](list(other.parameters())[::-1])
    set_optimizer_state(resumed, other.named_parameters(), state)
    for a, b in ((net, optimizer), (other, resumed)):
        torch.manual_seed(5)
        train(a, b, 3)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    want, got = by_name(optimizer, net), by_name(resumed, other)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) and want[k].dtype == got[k].dtype for k in want)


def test_moments_wider_than_their_parameter_keep_their_bits(tmp_path: Path) -> None:
    net = model(dtype=torch.bfloat16)
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, 1)
    for state in optimizer.state.values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape, dtype=torch.float32)
    want = optimizer_state(optimizer, net.named_parameters())
    set_optimizer_state(optimizer, net.named_parameters(), through_disk(want, tmp_path))
    got = by_name(optimizer, net)
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in want.tensors.items())


def test_groups_match_by_name_and_keep_their_settings(tmp_path: Path) -> None:
    net = model()
    decayed, plain = [net[0].weight, net[2].weight], [net[0].bias, net[2].bias]
    first = optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    train(net, first, 1)
    state = through_disk(optimizer_state(first, net.named_parameters()), tmp_path)
    other = optim.AdamW([{"params": plain[::-1]}, {"params": decayed}], weight_decay=0.7, foreach=True)
    set_optimizer_state(other, net.named_parameters(), state)
    assert [group["weight_decay"] for group in other.param_groups] == [0.0, 0.1]
    assert all(group["foreach"] is True and group["betas"] == (0.9, 0.999) for group in other.param_groups)
    with pytest.raises(CheckpointError, match=r"one group here \(0\.weight, \.\.\.\) had different settings"):
        set_optimizer_state(optim.AdamW(net.parameters()), net.named_parameters(), state)


def test_a_misfit_is_refused_and_changes_nothing() -> None:
    net = model()
    optimizer = optim.AdamW(net.parameters())
    train(net, optimizer, 1)
    state = optimizer_state(optimizer, net.named_parameters())
    renamed = [(name.replace("0.weight", "0.weights"), p) for name, p in net.named_parameters()]
    before = {k: v.clone() for k, v in state.tensors.items()}
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: 0\.weights; did you mean '0\.weight'\?"):
        set_optimizer_state(optimizer, renamed, state)
    wide = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(CheckpointError, match=r"0\.bias is \[7\] in the checkpoint, \[8\] here"):
        set_optimizer_state(optim.AdamW(wide.parameters()), wide.named_parameters(), state)
    with pytest.raises(CheckpointError, match="optimizer is AdamW, this run's is SGD"):
        set_optimizer_state(optim.SGD(net.parameters()), net.named_parameters(), state)
    with pytest.raises(CheckpointError, match="none of the model's"):
        optimizer_state(optim.SGD([nn.Parameter(torch.zeros(2))]), net.named_parameters())
    after = optimizer_state(optimizer, net.named_parameters()).tensors
    assert all(torch.equal(after[k], before[k]) for k in before)


def draws() -> list[float]:
    return [
        random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
        float(torch.rand(())), float(torch.randn(())),
    ]  # fmt: skip


@pytest.mark.skipif(
    hasattr(rng_state, "__wrapped__"), reason="beartype's run-time checks draw from `random` themselves"
)
def test_every_generator_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    draws()  # gauss() and randn() then hold a second value back, which is part of the state
    state = through_disk(rng_state(), tmp_path)
    want = draws() + draws()
    draws()
    assert set_rng_state(state) == ()
    assert draws() + draws() == want


def test_a_broken_random_state_is_named_and_missing_devices_are_noted() -> None:
    state = rng_state()
    with pytest.raises(CheckpointError, match="random state cannot be restored"):
        set_rng_state(FlatState(tensors={}, meta=state.meta))
    many = {f"torch_cuda_{i}": torch.zeros(16, dtype=torch.uint8) for i in range(torch.cuda.device_count(), 99)}
    if not torch.cuda.is_available():
        notes = set_rng_state(FlatState(tensors=state.tensors | many, meta=state.meta))
        assert "99 CUDA devices" in notes[0]

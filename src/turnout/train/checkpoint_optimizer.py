"""An optimizer's state by parameter name: it does not depend on the order of parameters or groups."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from turnout.errors import CheckpointError
from turnout.train.checkpoint_fit import check_same
from turnout.train.checkpoint_tensors import FlatState

# How the machine computes, not what: a resumed run keeps its own choice.
_MACHINE_SETTINGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
_NO_SETTINGS = _MACHINE_SETTINGS | {"params", "param_names"}


def optimizer_state(optimizer: Optimizer, named: Iterable[tuple[str, Tensor]]) -> FlatState:
    """The state of `optimizer` as tensors called `parameter/key` and JSON; `named` is model.named_parameters().

    The tensors are the optimizer's own, so save them before its next step.

    Raises: CheckpointError if a parameter has no name, or a value is neither a tensor nor a JSON scalar.
    """
    name_of = {id(parameter): name for name, parameter in named}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    groups, shapes = [], {}
    for number, group in enumerate(optimizer.param_groups):
        names = [_name(name_of, parameter) for parameter in group["params"]]
        groups.append({"params": names, "settings": _settings(group, number, tensors)})
        for name, parameter in zip(names, group["params"], strict=True):
            shapes[name] = list(parameter.shape)
            _flatten(name, optimizer.state.get(parameter, {}), tensors, scalars)
    meta = {"kind": type(optimizer).__name__, "groups": groups, "shapes": shapes, "scalars": scalars}
    return FlatState(tensors=tensors, meta=meta)


def join_optimizer_meta(metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON of optimizers that have a model's parameters between them, as if one had them all."""
    first, *others = metas
    groups: list[dict[str, Any]] = [dict(group) for group in first["groups"]]
    for group in (group for meta in others for group in meta["groups"]):
        like = next((known for known in groups if known["settings"] == group["settings"]), None)
        if like is None:
            groups.append(dict(group))
        else:
            new = [name for name in group["params"] if name not in like["params"]]
            like["params"] = [*like["params"], *new]
    # what several have, as tied ends of a pipeline do, is alike
    joined = {key: {n: v for meta in metas for n, v in meta[key].items()} for key in ("shapes", "scalars")}
    return {"kind": first["kind"], "groups": groups, **joined}


def set_optimizer_state(
    optimizer: Optimizer, named: Iterable[tuple[str, Tensor]], state: FlatState, *, own_settings: bool = False
) -> None:
    """Restore what `optimizer_state` gave, bit for bit, whatever the order of parameters and groups here.

    torch's load_state_dict would cast moments to the parameter's dtype and go by position. The settings foreach,
    fused, capturable and differentiable stay as they are here; with `own_settings` all do, rates and decay too.
    Raises: CheckpointError if the kind, the parameter names or shapes, or the settings do not fit; the optimizer
    is then unchanged.
    """
    name_of = {id(parameter): name for name, parameter in named}
    members = [(p, _name(name_of, p), group) for group in optimizer.param_groups for p in group["params"]]
    if not {"kind", "groups", "shapes", "scalars"} <= state.meta.keys():
        raise CheckpointError(f"the checkpoint's optimizer part is incomplete: it has {sorted(state.meta)}")
    if state.meta["kind"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint's optimizer is {state.meta['kind']}, this run's is {type(optimizer).__name__}"
        )
    shapes = {name: str(shape) for name, shape in state.meta["shapes"].items()}
    check_same({name: str(list(p.shape)) for p, name, _ in members}, shapes, "optimizer")
    settings = [{} for _ in optimizer.param_groups] if own_settings else _group_settings(optimizer, name_of, state)
    values = _by_parameter(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    optimizer.state.clear()
    for parameter, name, group in members:
        if name in values:
            optimizer.state[parameter] = {k: _placed(v, k, parameter, group) for k, v in values[name].items()}


def _name(name_of: Mapping[int, str], parameter: Tensor) -> str:
    if id(parameter) not in name_of:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is none of the model's; "
            "build the optimizer from the parameters of the model that is saved"
        )
    return name_of[id(parameter)]


def _settings(group: Mapping[str, Any], number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    settings = {}
    for key, value in group.items():
        if isinstance(value, Tensor):
            tensors[f"param_groups/{number}/{key}"] = value
        elif key not in _NO_SETTINGS:
            settings[key] = list(value) if isinstance(value, tuple) else value
    return settings


def _flatten(
    name: str, state: Mapping[str, Any], tensors: dict[str, Tensor], scalars: dict[str, dict[str, Any]]
) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{name}/{key}"] = value
        elif value is None or isinstance(value, bool | int | float | str):
            scalars.setdefault(name, {})[key] = value
        else:
            raise CheckpointError(
                f"optimizer state {key!r} of {name} is a {type(value).__name__}; a checkpoint holds tensors, "
                "numbers, strings and None"
            )


def _group_settings(optimizer: Optimizer, name_of: Mapping[int, str], state: FlatState) -> list[dict[str, Any]]:
    """For each group here, the settings its parameters had, which must be the same for all of them."""
    saved = [_saved_settings(number, group, state) for number, group in enumerate(state.meta["groups"])]
    number_of = {name: i for i, group in enumerate(state.meta["groups"]) for name in group["params"]}
    result = []
    for group in optimizer.param_groups:
        names = [name_of[id(parameter)] for parameter in group["params"]]
        numbers = sorted({number_of[name] for name in names})
        if any(saved[number] != saved[numbers[0]] for number in numbers):
            raise CheckpointError(
                f"parameters of one group here ({names[0]}, ...) had different settings in the checkpoint: "
                f"{[saved[number] for number in numbers]}; group them as the saved run did"
            )
        result.append(_fitting(saved[numbers[0]], group) if numbers else {})
    return result


def _saved_settings(number: int, group: Mapping[str, Any], state: FlatState) -> dict[str, Any]:
    prefix = f"param_groups/{number}/"
    tensors = {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
    return group["settings"] | tensors


def _fitting(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings in the types used here; a setting that a newer torch added keeps its value here."""
    unknown = sorted(set(saved) - set(group))
    if unknown:
        raise CheckpointError(
            f"the checkpoint's optimizer has the setting {unknown[0]!r}, which this one lacks; "
            "it was saved by another version of torch or another optimizer"
        )
    settings = {}
    for key, value in saved.items():
        here = group[key]
        settings[key] = tuple(value) if isinstance(here, tuple) else value
        if isinstance(here, Tensor):
            settings[key] = torch.as_tensor(value, dtype=here.dtype, device=here.device).clone()
        elif isinstance(value, Tensor):
            settings[key] = value.item()
    return settings


def _by_parameter(state: FlatState) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {name: dict(each) for name, each in state.meta["scalars"].items()}
    for path, tensor in state.tensors.items():
        name, _, key = path.rpartition("/")
        if not path.startswith("param_groups/"):
            values.setdefault(name, {})[key] = tensor
    unknown = sorted(set(values) - set(state.meta["shapes"]))
    if unknown:
        raise CheckpointError(f"the checkpoint has optimizer state of {unknown[0]!r}, which it does not list")
    return values


def _placed(value: Any, key: str, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """A copy on the parameter's device; `step` stays on the CPU unless the step itself runs on the device."""
    if not isinstance(value, Tensor):
        return value
    on_device = key != "step" or group.get("capturable") or group.get("fused")
    return value.to(parameter.device if on_device else "cpu", copy=True)

"""Layers of this library: a preset of a paper, or the settings of a recipe."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

import turnout
from turnout import presets, reference
from turnout.errors import ConfigError
from turnout.experts import FFNExperts
from turnout.layers import MoE, MoEConfig
from turnout.layers.latent import Latent
from turnout.tensors import MoEOutput, total_loss
from turnout.verify.subject import Expert, Layer, NotApplicable, Sizes, Subject


def from_preset(name: str) -> Subject:
    """A layer of `turnout.presets`."""
    factory = getattr(presets, name)
    if "num_experts" not in inspect.signature(factory).parameters:
        raise ConfigError(f"turnout.presets.{name} does not build a layer")
    return Subject(name=name, build=functools.partial(_preset, factory), versions=_versions())


def from_config(name: str, dim: int, config: MoEConfig) -> Subject:
    """The layer a recipe describes, in the suite's sizes: its router, capacity, losses and expert kind."""
    return Subject(name=name, build=functools.partial(_configured, dim, config), versions=_versions())


class OwnLayer(Layer):
    """A `turnout.MoE`."""

    module: MoE

    def __init__(self, module: MoE) -> None:
        super().__init__(module, dim=module.dim, num_experts=module.config.num_experts)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._output(x, mask).y

    def gates(self, x_TD: Tensor) -> Tensor:
        generator = _generator()  # the capacity draws on from where the router stopped, as in a call of the layer
        assignment = self.module.router(x_TD, _ids(x_TD), None, generator).assignment
        capacity = self.module.config.capacity
        admission = capacity.admit(assignment, training=self.module.training, generator=generator)
        weight_N = assignment.weight_N if admission.keep_N is None else assignment.weight_N * admission.keep_N
        gate_TE = x_TD.new_zeros(len(x_TD), self.num_experts, dtype=weight_N.dtype)
        return gate_TE.index_put((assignment.token_N, assignment.expert_N), weight_N, accumulate=True)

    def experts(self) -> list[Expert]:
        """Between the latent projections, if there are any: those are linear, so that each expert may have its own."""
        latent = self.module.latent
        if latent is None:
            return self._experts()
        return [functools.partial(_between, latent, expert) for expert in self._experts()]

    def _experts(self) -> list[Expert]:
        experts = self.module.experts
        if not isinstance(experts, FFNExperts):
            return list(experts.children())
        ups, downs = experts.up_EDG.unbind(), experts.down_EFD.unbind()
        up_biases = [0.0] * len(ups) if experts.up_bias_EG is None else experts.up_bias_EG.unbind()
        down_biases = [0.0] * len(ups) if experts.down_bias_ED is None else experts.down_bias_ED.unbind()
        kind = self.module.config.expert
        return [
            functools.partial(reference.ffn, up_DG=up, down_FD=down, kind=kind, up_bias_G=ub, down_bias_D=db)
            for up, down, ub, db in zip(ups, downs, up_biases, down_biases, strict=True)
        ]

    def shared(self, x_TD: Tensor) -> Tensor:
        return torch.zeros_like(x_TD) if self.module.shared is None else self.module.shared(x_TD)

    def expert_parameters(self) -> Mapping[str, Tensor]:
        if not isinstance(self.module.experts, FFNExperts):
            raise NotApplicable("its experts are modules of their own")
        return {f"experts.{name}": p for name, p in self.module.experts.named_parameters()}

    def router_parameters(self) -> Mapping[str, Tensor]:
        return {f"router.{name}": p for name, p in self.module.router.named_parameters()}

    def auxiliary_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        terms = self._output(x, mask).losses  # those of the settings, and the router's own
        if not terms:
            raise NotApplicable("has no auxiliary loss")
        return total_loss(terms)

    def counts(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._output(x, mask).stats.assigned_E

    def _output(self, x: Tensor, mask: Tensor | None) -> MoEOutput:
        return self.module(x, mask=mask, token_ids=_ids(x), generator=_generator())


def _between(latent: Latent, expert: Expert, x_TD: Tensor) -> Tensor:
    return latent.up(expert(latent.down(x_TD, None)))


def _preset(factory: Callable[..., MoE], sizes: Sizes) -> OwnLayer:
    settings = {"k": sizes.k} if "k" in inspect.signature(factory).parameters else {}
    try:
        return OwnLayer(factory(sizes.dim, sizes.hidden, sizes.num_experts, **settings))
    except ConfigError as error:
        raise NotApplicable(str(error)) from error


def _configured(dim: int, config: MoEConfig, sizes: Sizes) -> OwnLayer:
    """In the suite's sizes; with its own experts and choices where its groups, say, do not fit those."""
    del dim
    try:
        return _in_sizes(config, sizes, num_experts=sizes.num_experts, k=sizes.k)
    except ConfigError as error:
        if sizes.num_experts > 1:
            try:
                return _in_sizes(config, sizes, num_experts=config.num_experts, k=config.router.choices)
            except ConfigError:
                pass
        raise NotApplicable(str(error)) from error


def _in_sizes(config: MoEConfig, sizes: Sizes, *, num_experts: int, k: int) -> OwnLayer:
    router = config.router
    if hasattr(router, "k"):
        router = replace(router, k=k)  # type: ignore[call-arg]
    shared_hidden = sizes.hidden if config.shared_hidden else 0
    settings = replace(config, num_experts=num_experts, hidden=sizes.hidden, router=router, shared_hidden=shared_hidden)
    return OwnLayer(MoE.from_config(sizes.dim, settings))


def _ids(x: Tensor) -> Tensor:
    """A made-up id for each token that follows it wherever the batch puts it; it depends on its content alone."""
    return (x.detach().double()[..., 0].nan_to_num(0.0) * 1e3).long().abs()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _versions() -> Mapping[str, str]:
    return {"turnout": turnout.__version__, "torch": torch.__version__}

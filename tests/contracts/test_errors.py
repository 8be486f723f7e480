"""Every error a user of the layer can cause names the values and the way out; no `raise` goes without its case."""

import ast
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import turnout
from tests.contracts.cases import takers
from turnout import MoE
from turnout.config import Settings
from turnout.contracts import CapacityPolicy, ExpertBackend, Loss, RouterConfig
from turnout.data.prepare import DataConfig
from turnout.dispatch import AffinityThreshold, Dropless, FixedCapacity, TutelCapacity
from turnout.errors import ConfigError, NonFiniteError, ShapeError, TurnoutError
from turnout.experts import (
    FFNExperts,
    Float8FFNExperts,
    ModuleExperts,
    QuantizedFFNExperts,
    available_backends,
    choose_backend,
    quantize_experts,
)
from turnout.experts.activations import Activation
from turnout.layers import MoEConfig
from turnout.layers.attention import AttentionConfig, AttentionKind
from turnout.layers.mla import MLAConfig
from turnout.layers.mlp import MLP
from turnout.losses import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    Importance,
    LoadBalance,
    LoadCV,
    Locality,
    RouterZ,
    load_balance_loss,
    locality_loss,
)
from turnout.models import ModelConfig
from turnout.placement import Placement, Site
from turnout.routers import (
    BASE,
    Cosine,
    DeepSeekV3,
    DeviceLimited,
    ExpertChoice,
    Forced,
    GShardTop2,
    Hash,
    Hierarchical,
    LocMoE,
    LocMoEPlus,
    NoisyTopK,
    Quantile,
    ReMoE,
    Replay,
    Sinkhorn,
    Switch,
    TopK,
    TopP,
    recording_of,
)
from turnout.tensors import Assignment, RouterOutput
from turnout.train.recipe import LoopConfig, OptimizerConfig, Recipe, ScheduleConfig

SOURCE = Path(turnout.__file__).parent
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


# for what a type checker refuses as well
untyped_moe: Any = MoE

Cause = Callable[[], object]


def untyped_top_k(top_k: Any) -> object:
    return MoE(4, 4, 3)(torch.zeros(2, 4), top_k=top_k)


def untyped_factor(factor: Any) -> object:
    return MoE(4, 4, 3, capacity=FixedCapacity())(torch.zeros(2, 4), capacity_factor=factor)


def quantize_nan(precision: str = "int8") -> object:
    layer = MoE(4, 4, 2)
    layer.experts.down_EFD.data[1, 2, 3] = NAN  # type: ignore[union-attr, index]
    return quantize_experts(layer, precision=precision)


def train_quantized() -> object:
    return quantize_experts(MoE(4, 4, 2))(torch.zeros(3, 4, requires_grad=True))


CASES: list[tuple[Cause, type[TurnoutError], str]] = [
    # routers
    (lambda: TopK(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: TopK(k=1), ConfigError, r"router\.k=1 with renormalize=true .* set renormalize=false, or use the switch"),
    (lambda: TopK(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: Switch(jitter=1.0), ConfigError, r"router\.jitter=1\.0 must be in \[0, 1\)"),
    (lambda: Switch(jitter=-0.1), ConfigError, r"router\.jitter=-0\.1 must be in \[0, 1\)"),
    (lambda: Switch(jitter=NAN), ConfigError, r"router\.jitter=nan must be in"),
    (lambda: GShardTop2().build(4, 1), ConfigError, r"gshard router needs at least 2 experts; num_experts=1"),
    (lambda: DeepSeekV3(k=1), ConfigError, r"router\.k=1 must be at least 2: the weight of a single choice is 2\.5"),
    (lambda: DeepSeekV3(groups=2, top_groups=3), ConfigError, r"top_groups=3 must be from 1 to groups=2"),
    (lambda: DeepSeekV3(bias_step=-1.0), ConfigError, r"router\.bias_step=-1\.0 must be at least 0"),
    (lambda: DeepSeekV3(groups=4).build(4, 10), ConfigError, r"groups=4 must divide num_experts=10; legal: \[1, 2, 5"),
    (lambda: DeepSeekV3(k=5, groups=4).build(4, 16), ConfigError, r"router\.k=5 is more than the 4 experts in top_gro"),
    (lambda: TopK(scale=-1.0), ConfigError, r"router\.scale=-1\.0 must be above 0 and finite"),
    (lambda: DeepSeekV3(k=2, scale=NAN), ConfigError, r"router\.scale=nan must be above 0 and finite"),
    (lambda: DeviceLimited(scale=-1.0), ConfigError, r"router\.scale=-1\.0 must be above 0"),
    (lambda: Forced(scale=INF), ConfigError, r"router\.scale=inf must be above 0"),
    (lambda: Quantile(scale=0.0), ConfigError, r"router\.scale=0\.0 must be above 0"),
    (lambda: MoEConfig(init_std=-1.0), ConfigError, r"moe\.init_std=-1\.0 must be at least 0"),
    (
        lambda: LoadBalance(scope="global", count="first"),
        ConfigError,
        r"load_balance\.count='first' cannot be counted over scope='global'; legal: count='all'",
    ),
    (lambda: Hash(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: Hash(tries=0), ConfigError, r"router\.tries=0 must be at least 1"),
    (lambda: Hash(tries=1001), ConfigError, r"router\.tries=1001 must be at most 1000"),
    (lambda: Hash(scale=0.0), ConfigError, r"router\.scale=0\.0 must be above 0"),
    (lambda: Hash(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: Hash().build(4, 3)(torch.zeros(2, 4)), ShapeError, r"hash router chooses by token id: .* with token_ids"),
    (lambda: hash_ids(torch.tensor([0.0, 1.0])), ShapeError, r"token_ids has torch\.float32; ids are whole numbers"),
    (lambda: hash_ids(torch.tensor([True, False])), ShapeError, r"token_ids has torch\.bool; ids are whole numbers"),
    (lambda: hash_ids(torch.tensor([0, 5])), ShapeError, r"token_ids go from 0 to 5; .*table has 0 to 4: raise router"),
    (lambda: hash_ids(torch.tensor([0, -1])), ShapeError, r"token_ids go from -1 to 0; the hash router's table has 0"),
    (lambda: TopK(gate_noise=-1.0), ConfigError, r"router\.gate_noise=-1\.0 must be a number of at least 0"),
    (lambda: TopK(gate_noise=INF), ConfigError, r"router\.gate_noise=inf must be a number of at least 0"),
    (lambda: GShardTop2(threshold=0.5), ConfigError, r"threshold=0\.5 must be in \[0, 0\.5\).*second_expert='none'"),
    (lambda: GShardTop2(threshold=NAN), ConfigError, r"router\.threshold=nan must be in \[0, 0\.5\)"),
    (lambda: NoisyTopK(k=1), ConfigError, r"router\.k=1 must be at least 2: the weight of a single choice is 1"),
    (lambda: NoisyTopK(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 2 to 3"),
    (lambda: Cosine(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: Cosine(k=1), ConfigError, r"router\.k=1 with renormalize=true .* set renormalize=false"),
    (lambda: Cosine(proj_dim=1), ConfigError, r"router\.proj_dim=1 must be at least 2: in one dimension"),
    (lambda: Cosine(temperature=0.001), ConfigError, r"temperature=0\.001 must be a number of at least 0\.01"),
    (lambda: Cosine(temperature=INF), ConfigError, r"temperature=inf must be a number of at least 0\.01"),
    (lambda: Cosine(init_std=0.0), ConfigError, r"init_std=0\.0 must be above 0: a zero vector has no direction"),
    (lambda: Cosine(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: TopP(p=0.0), ConfigError, r"router\.p=0\.0 must be in \(0, 1\]"),
    (lambda: TopP(p=NAN), ConfigError, r"router\.p=nan must be in \(0, 1\]"),
    (lambda: TopP(most=-1), ConfigError, r"router\.most=-1 must be at least 0; 0 is no limit"),
    (lambda: TopP(most=1), ConfigError, r"expected_choices=2 must be at least 1, and at most most=1"),
    (lambda: TopP(expected_choices=0), ConfigError, r"router\.expected_choices=0 must be at least 1"),
    (lambda: TopP(most=5).build(4, 3), ConfigError, r"router\.most=5 is more than num_experts=3"),
    (lambda: TopP(expected_choices=4).build(4, 3), ConfigError, r"expected_choices=4 is more than num_experts=3"),
    (lambda: LocMoE().build(12, 5), ConfigError, r"num_experts=5 must divide dim=12; legal: \[1, 2, 3, 4, 6, 12\]"),
    (lambda: LocMoEPlus().build(12, 5), ConfigError, r"num_experts=5 must divide dim=12; legal: \[1, 2, 3"),
    (lambda: LocMoEPlus(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: LocMoEPlus(k=5).build(12, 4), ConfigError, r"router\.k=5 is more than num_experts=4; legal: 1 to 4"),
    (lambda: LocMoEPlus(threshold=0.0), ConfigError, r"router\.threshold=0\.0 must be above 0 and at most 1"),
    (lambda: LocMoEPlus(factor=NAN), ConfigError, r"router\.factor=nan must be a number above 0"),
    (lambda: LocMoEPlus(temperature=0.0), ConfigError, r"router\.temperature=0\.0 must be a number above 0"),
    (lambda: LocMoEPlus(switch_kept=1.5), ConfigError, r"router\.switch_kept=1\.5 must be from 0 to 1"),
    (lambda: LocMoEPlus(switch_window=0), ConfigError, r"router\.switch_window=0 must be at least 1"),
    (lambda: LocMoEPlus(switch_kept=0.1), ConfigError, r"switch_kept=0\.1 would wait forever .* before_switch=hybrid"),
    (lambda: ExpertChoice(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (
        lambda: ExpertChoice(in_decoder="never"),
        ConfigError,
        r"ExpertChoice\.in_decoder='never' must be one of: refuse, allow",
    ),
    (
        lambda: LocMoEPlus(evaluation="mode").check_decoder(),
        ConfigError,
        r"locmoe_plus with evaluation='mode' and mode='hybrid' lets .* later tokens .*evaluation='token_choice'",
    ),
    (
        lambda: ModelConfig(moe=MoEConfig(num_experts=8, router=Switch(), capacity=FixedCapacity(priority="score"))),
        ConfigError,
        r"fixed with priority='score' .* evaluation: their rows of higher score .*eval_factor=8, .*in_decoder='allow'",
    ),
    (
        lambda: TutelCapacity().check_decoder(TopK(k=2), 8),
        ConfigError,
        r"tutel with priority='position' .* their first choices .*use capacity\.factor=0",
    ),
    (
        lambda: AffinityThreshold().check_decoder(Switch(), 8),
        ConfigError,
        r"affinity lets .* rows of higher affinity .*use the policy none",
    ),
    (lambda: ExpertChoice().check_decoder(), ConfigError, r"expert choice lets .* later tokens: .*in_decoder='allow'"),
    (lambda: ExpertChoice(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: BASE(precision=0.0), ConfigError, r"router\.precision=0\.0 must be from 1e-6 up to 1"),
    (lambda: Sinkhorn(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: Sinkhorn(tolerance=NAN), ConfigError, r"router\.tolerance=nan must be above 0"),
    (lambda: Sinkhorn(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: LocMoE(floor="best"), ConfigError, r"LocMoE\.floor='best' must be one of: first_step, none"),
    (lambda: Quantile(memory=1.0), ConfigError, r"router\.memory=1\.0 must be at least 0 and below 1"),
    (lambda: Quantile(rounds=0), ConfigError, r"router\.rounds=0 must be at least 1"),
    (lambda: Quantile(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: ReMoE(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: ReMoE(start=0.0), ConfigError, r"router\.start=0\.0 must be above 0 and at most router\.limit=1\.0"),
    (lambda: ReMoE(growth=1.0), ConfigError, r"router\.growth=1\.0 must be a number above 1"),
    (lambda: ReMoE(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: Hash(vocab_size=-1), ConfigError, r"router\.vocab_size=-1 must be at least 0"),
    (
        lambda: Hash(vocab_size=3).build(4, 3).before_training(torch.ones(5).long()),
        ConfigError,
        r"vocab_size=3 is less than the 5 ids .* legal: 5 or more, or 0",
    ),
    (lambda: Forced(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: Forced(skew=NAN), ConfigError, r"router\.skew=nan must be a number of at least 0"),
    (lambda: Forced(k=5).build(4, 3), ConfigError, r"router\.k=5 is more than num_experts=3; legal: 1 to 3"),
    (lambda: Hierarchical(groups=1), ConfigError, r"router\.groups=1 must be at least 2; for one group use its router"),
    (
        lambda: Hierarchical(groups=4).build(4, 10),
        ConfigError,
        r"groups=4 must divide num_experts=10 into groups of at",
    ),
    (
        lambda: Hierarchical(groups=4, inner=TopK(k=3)).build(4, 8),
        ConfigError,
        r"the inner router chooses among 2: router\.k=3",
    ),
    (
        lambda: Hierarchical(inner=Quantile()).build(4, 8),
        ConfigError,
        r"router\.inner: the router Quantile learns from .* \(its calls' prices\), which no router within",
    ),
    (
        lambda: Replay(TopK().build(4, 3), any_assignment()),
        ConfigError,
        r"recording has num_experts=1; the live router has 3",
    ),
    (
        lambda: Replay(Hash().build(4, 1), any_assignment()),
        ConfigError,
        r"weights a HashRouter gives .* set weights='recorded'",
    ),
    (
        lambda: Replay(Switch().build(4, 1), any_assignment())(torch.zeros(2, 4)),
        ShapeError,
        r"recording has 1 tokens; this call has 2",
    ),
    (
        lambda: Replay(Switch().build(4, 1), any_assignment())(torch.zeros(1, 4), None, torch.zeros(1).bool()),
        ShapeError,
        r"made with another mask",
    ),
    (
        lambda: recording_of(torch.tensor([[0, 0]]), num_experts=4),
        ShapeError,
        r"recorded token needs 2 different experts from 0 to 3",
    ),
    (
        lambda: (lambda layer: torch.func.vmap(lambda x: layer(x).y)(torch.zeros(2, 3, 4)))(MoE(4, 4, 2)),
        ConfigError,
        r"no forward-mode derivatives, no vmap, jvp or grad of torch\.func; take finite differences",
    ),
    (
        lambda: TopK().build(4, 3)(torch.zeros(2, 4), top_k=4),
        ConfigError,
        r"top_k=4 for one call must be a whole number from 1 to num_ex",
    ),
    (
        lambda: untyped_top_k(2.0),
        ConfigError,
        r"top_k=2\.0 for one call must be a whole number from 1 to num_experts=3",
    ),
    (lambda: untyped_top_k(True), ConfigError, r"top_k=True for one call must be a whole number from 1 to"),
    (lambda: untyped_top_k("2"), ConfigError, r"top_k='2' for one call must be a whole number from 1 to"),
    (lambda: untyped_factor("0"), ConfigError, r"capacity_factor='0' for one call must be a finite number"),
    (lambda: untyped_factor(True), ConfigError, r"capacity_factor=True for one call must be a finite number"),
    (
        lambda: MoE(4, 4, 3, router=Returning(0))(torch.zeros(2, 4), top_k=2),
        ConfigError,
        r"top_k=2 for one call: the forward of Returning takes no top_k; leave it out",
    ),
    (lambda: Switch().build(4, 3)(torch.zeros(2, 4), top_k=2), ConfigError, r"a SwitchRouter has its own number of"),
    (lambda: DeviceLimited(k=0), ConfigError, r"router\.k=0 must be at least 1"),
    (lambda: DeviceLimited(groups=2, top_groups=3), ConfigError, r"top_groups=3 must be from 1 to groups=2"),
    (lambda: DeviceLimited(groups=4).build(4, 10), ConfigError, r"groups=4 must divide num_experts=10; legal: \[1"),
    (lambda: DeviceLimited(groups=4).build(4, 16), ConfigError, r"router\.k=6 is more than the 4 experts in top_gro"),
    (lambda: TopK().build(4, 3)(torch.zeros(2, 5)), ShapeError, r"router got width 5; it was built for dim=4"),
    (lambda: TopK().build(4, 3)(torch.zeros(2, 4), None, torch.ones(3).bool()), ShapeError, r"mask .*\(3,\).*\(2,\)"),
    (lambda: TopK().build(4, 3)(torch.zeros(2, 4), None, torch.ones(2)), ShapeError, r"torch\.float32; .* torch\.bool"),
    (lambda: any_assignment().as_topk(), ShapeError, r"as_topk\(\) needs a router that gives every token exactly K"),
    # layer
    (lambda: MoE(4, 8, 0), ConfigError, r"moe\.num_experts=0 must be from 1 to 65536"),
    (
        lambda: untyped_moe(4, 8, 2, router="topk"),
        ConfigError,
        r"MoEConfig\.router='topk' must be a router: .* mean 'TopK\(\)'",
    ),
    (
        lambda: untyped_moe(4, 8, 2, router=TopK),
        ConfigError,
        r"router=<class .*TopK'> must be a router: .*mean 'TopK\(\)'\?",
    ),
    (
        lambda: untyped_moe(4, 8, 2, capacity=1.25),
        ConfigError,
        r"capacity=1\.25 must be a capacity policy: .*FixedCapacity",
    ),
    (
        lambda: untyped_moe(4, 8, 2, losses=LoadBalance()),
        ConfigError,
        r"losses=LoadBalance\(.*must be a tuple, each item a loss",
    ),
    (
        lambda: untyped_moe(4, 8, 2, losses=(LoadBalance,)),
        ConfigError,
        r"losses\[0\]=<class .*mean 'LoadBalance\(\)'\?",
    ),
    (lambda: MoE(0, 8, 2), ConfigError, r"dim=0 must be from 1 to"),
    (lambda: MoE(-1, 8, 2), ConfigError, r"dim=-1 must be from 1 to"),
    (
        lambda: untyped_moe(4, 8, 2, expert=nn.Linear(4, 4)),
        ConfigError,
        r"expert=Linear\(.* must be a kind, .*lambda: nn\.Linear",
    ),
    (
        lambda: FFNExperts(4, 6, 2).cuts(Placement.even(2, 1), 4),
        ConfigError,
        r"strategy\.etp=4 must divide moe\.hidden=6; nearest legal: 3",
    ),
    (
        lambda: untyped_moe(4, 8, 2, expert=lambda: 1),
        ConfigError,
        r"function given as expert made 1; each expert must be a torch",
    ),
    (
        lambda: MoE(4, 8, 2, expert=lambda: nn.Linear(4, 5))(torch.zeros(3, 4)),
        ShapeError,
        r"expert Linear made shape \(\d, 5\) of rows of shape \(\d, 4\); legal: the same",
    ),
    (
        lambda: MoE(4, 8, 2, expert=lambda: Returning((1, 2)))(torch.zeros(3, 4)),
        ShapeError,
        r"expert Returning made tuple of rows of shape",
    ),
    (
        lambda: MoE(4, 8, 2, router=nn.Linear(4, 2)),
        ConfigError,
        r"router=Linear is not called as a Router is, with \(x_TD",
    ),
    (
        lambda: MoE(4, 8, 2, router=TopK().build(4, 3)),
        ConfigError,
        r"router=TopKRouter was built for dim=4, num_experts=3; the layer has dim=4, num_experts=2",
    ),
    (
        lambda: MoE(4, 8, 2, router=Returning(torch.zeros(3, 2)))(torch.zeros(3, 4)),
        ConfigError,
        r"router=Returning returned Tensor; a Router returns a RouterOutput",
    ),
    (
        lambda: MoE(4, 8, 3, router=Returning(routed()))(torch.zeros(3, 4)),
        ConfigError,
        r"gave an assignment of num_tokens=3, num_experts=2; this call has num_tokens=3, num_experts=3",
    ),
    (
        lambda: MoE(4, 8, 2, router=Returning(routed(expert=2)))(torch.zeros(3, 4)),
        ConfigError,
        r"router=Returning gave expert_N from 2 to 2; legal: 0 to 1",
    ),
    (
        lambda: MoE(4, 8, 2, router=Returning(routed(expert=-1)))(torch.zeros(3, 4)),
        ConfigError,
        r"router=Returning gave expert_N from -1 to -1; legal: 0 to 1",
    ),
    (lambda: TopK(init_std=-1.0).build(4, 3), ConfigError, r"init_std=-1\.0 must be at least 0 and finite"),
    (lambda: Switch(init_std=NAN).build(4, 3), ConfigError, r"init_std=nan must be at least 0 and finite"),
    (lambda: QuantizedFFNExperts(4, 4, 2, activation_bits=4), ConfigError, r"activation_bits=4 must be 16 or 8"),
    (
        lambda: quantize_experts(nn.Linear(4, 4)),
        ConfigError,
        r"Linear has no feed-forward experts to quantise; give it",
    ),
    (
        lambda: quantize_experts(MoE(4, 4, 2), precision="fp4"),
        ConfigError,
        r"unknown precision 'fp4'; available: int8, int8-a8, fp8",
    ),
    (
        lambda: quantize_experts(MoE(4, 4, 2), precision="fp8", activation_bits=16),
        ConfigError,
        r"precision='fp8' rounds activations to 8 bits; activation_bits=16 is for 'int8'",
    ),
    (
        lambda: quantize_nan(precision="fp8"),
        NonFiniteError,
        r"experts\.down_EFD has NaN or infinite values; no scale brings them into 8 bits",
    ),
    (quantize_nan, NonFiniteError, r"experts\.down_EFD has NaN or infinite values; 8 bits have no code"),
    (train_quantized, ConfigError, r"quantised experts are for inference alone: call the layer under torch"),
    (lambda: FFNExperts(4, 4, 2, init_std=-1.0), ConfigError, r"init_std=-1\.0 must be at least 0 and finite"),
    (lambda: MLP(4, 4, init_std=NAN), ConfigError, r"init_std=nan must be at least 0 and finite"),
    (lambda: AttentionConfig().build(4, layer=0, init_std=INF, norm_eps=1e-6), ConfigError, r"init_std=inf must be"),
    (lambda: MLAConfig().build(4, layer=0, init_std=-0.1, norm_eps=1e-6), ConfigError, r"init_std=-0\.1 must be"),
    (lambda: MoE(4, 0, 2), ConfigError, r"moe\.hidden=0 must be from 1 to"),
    (lambda: MoE(4, 8, 2, shared_hidden=-1), ConfigError, r"moe\.shared_hidden=-1 must be from 0 to"),
    (lambda: MoEConfig(num_experts=2, router=TopK(k=3)), ConfigError, r"takes 3 experts a token; num_experts=2"),
    (lambda: MoE(4, 8, 2, expert="swiglo"), ConfigError, r"unknown expert kind 'swiglo'; .*did you mean 'swiglu'\?"),
    (lambda: MoE(4, 8, 2, backend="lop"), ConfigError, r"unknown moe\.backend 'lop'; .*did you mean 'loop'\?"),
    (lambda: MoE(4, 8, 2)(torch.zeros(3, 5)), ShapeError, r"x has width 5; the layer was built for dim=4"),
    (
        lambda: MoE(4, 8, 2)(torch.zeros(2, 3, 4), mask=torch.ones(6).bool()),
        ShapeError,
        r"mask .*\(6,\).* needs \(2, 3\)",
    ),
    (
        lambda: MoE(4, 8, 2)(torch.zeros(3, 4), token_ids=torch.ones(2).long()),
        ShapeError,
        r"token_ids has shape \(2,\)",
    ),
    (
        lambda: MoE(4, 8, 2)(torch.zeros(3, 4).long()),
        ShapeError,
        r"x has torch\.int64; .* floating point: pass x\.float",
    ),
    (
        lambda: MoE(4, 8, 2)(torch.zeros(2, 4), token_ids=torch.zeros(2)),
        ShapeError,
        r"token_ids has torch\.float32; ids are whole",
    ),
    (lambda: differentiated_twice("loop"), ConfigError, r"create_graph=True: .* no second derivatives .* finite diff"),
    (lambda: MoE(4, 8, 2)(torch.zeros(3, 4), mask=torch.ones(3)), ShapeError, r"mask .* torch\.float32; .*torch\.bool"),
    # capacity
    (lambda: FixedCapacity(factor=0.0), ConfigError, r"capacity\.factor=0\.0 must be a number above 0; .* policy none"),
    (lambda: FixedCapacity(factor=NAN), ConfigError, r"capacity\.factor=nan must be a number above 0"),
    (lambda: FixedCapacity(factor=INF), ConfigError, r"capacity\.factor=inf must be a number above 0"),
    (lambda: FixedCapacity(minimum=-1), ConfigError, r"capacity\.minimum=-1 and group_size=0 must be at least 0"),
    (lambda: FixedCapacity(group_size=-2), ConfigError, r"capacity\.minimum=1 and group_size=-2 must be at least 0"),
    (
        lambda: FixedCapacity(eval_factor=-1.0),
        ConfigError,
        r"capacity\.eval_factor=-1\.0 must be a number, at least 0; 0: the same",
    ),
    (lambda: FixedCapacity(eval_factor=INF), ConfigError, r"capacity\.eval_factor=inf must be a number"),
    (
        lambda: FixedCapacity().admit(any_assignment(), factor=NAN),
        ConfigError,
        r"capacity_factor=nan for one call must",
    ),
    (
        lambda: Dropless().admit(any_assignment(), factor=1.0),
        ConfigError,
        r"capacity_factor=1\.0 .* policy none has no",
    ),
    (lambda: TutelCapacity(factor=NAN), ConfigError, r"capacity\.factor=nan must be a finite number: above 0 a factor"),
    (lambda: TutelCapacity(alignment=0), ConfigError, r"capacity\.alignment=0 must be at least 1"),
    (lambda: AffinityThreshold(threshold=0.0), ConfigError, r"capacity\.threshold=0\.0 must be above 0 and at most 1"),
    (lambda: AffinityThreshold(minimum=-1), ConfigError, r"capacity\.minimum=-1 must be at least 0"),
    (
        lambda: AffinityThreshold(factor=-1.0),
        ConfigError,
        r"capacity\.factor=-1\.0 must be a number, at least 0; 0: no",
    ),
    # backends
    (
        lambda: choose("grouped_mm", FFNExperts(4, 4, 2), torch.float64),
        ConfigError,
        r"no torch\.float64; use backend='l",
    ),
    (lambda: choose("grouped_mm", modules(), torch.float32), ConfigError, r"modules of your own need backend='loop'"),
    (lambda: choose("padded_bmm", modules(), torch.float32), ConfigError, r"modules of your own need backend='loop'"),
    (lambda: choose("loup", modules(), torch.float32), ConfigError, r"unknown expert backend 'loup'; .*mean 'loop'\?"),
    # losses
    (lambda: LoadBalance(coefficient=-0.1), ConfigError, r"load_balance\.coefficient=-0\.1 must be at least 0"),
    (lambda: LoadBalance(coefficient=NAN), ConfigError, r"load_balance\.coefficient=nan must be at least 0"),
    (lambda: RouterZ(coefficient=-1.0), ConfigError, r"router_z\.coefficient=-1\.0 must be at least 0"),
    (lambda: Importance(coefficient=-1.0), ConfigError, r"importance\.coefficient=-1\.0 must be at least 0"),
    (lambda: LoadCV(coefficient=-1.0), ConfigError, r"load_cv\.coefficient=-1\.0 must be at least 0"),
    (lambda: MoE(4, 8, 2, losses=(LoadCV(),)), ConfigError, r"load_cv needs a router with noise.*noisy_topk"),
    (
        lambda: MoE(4, 8, 2, router=TopK().build(4, 2), losses=(LoadCV(),))(torch.zeros(3, 4)),
        ConfigError,
        r"load_cv needs a router with noise",
    ),
    (
        lambda: MoE(4, 8, 2, router=Hash(), losses=(RouterZ(),)),
        ConfigError,
        r"loss RouterZ would be a constant: nothing in the router Hash learns.*losses=\(\), .* model\.moe\.losses=\[\]",
    ),
    (lambda: Entropy(coefficient=NAN), ConfigError, r"entropy\.coefficient=nan must be at least 0"),
    (lambda: DeviceBalance(coefficient=-1.0), ConfigError, r"device_balance\.coefficient=-1\.0 must be at least 0"),
    (lambda: DeviceBalance(groups=0), ConfigError, r"device_balance\.groups=0 must be at least 1"),
    (lambda: DeviceBalance(groups=3).check(TopK(), 8), ConfigError, r"groups=3 of a balance .* legal: \[1, 2, 4, 8\]"),
    (
        lambda: MoE(4, 8, 4, losses=(DeviceBalance(),)),
        ConfigError,
        r"device_balance\.groups=1 makes the loss a constant: .* set groups to the number of .* or use load_balance",
    ),
    (
        lambda: MoE(4, 8, 4, losses=(CommunicationBalance(),)),
        ConfigError,
        r"communication_balance\.groups=1 makes the loss a constant",
    ),
    (lambda: Locality(coefficient=NAN), ConfigError, r"locality\.coefficient=nan must be at least 0"),
    (lambda: Locality(epsilon=1.0), ConfigError, r"locality\.epsilon=1\.0 must be between 0 and 1"),
    *(
        (
            lambda local=local: Locality(local=local),
            ConfigError,
            r"locality\.local=.* must be a tuple of experts in rising",
        )
        for local in ((1, 0), (1, 1), (-1, 0), (0.5,), (True,), "01", 3)
    ),
    (
        lambda: MoE(4, 8, 4, losses=(Locality(local=(2, 4)),)),
        ConfigError,
        r"locality\.local=\[2, 4\] names expert 4; num_experts=4, so legal are 0 to 3",
    ),
    (
        lambda: MoE(4, 8, 2, losses=(Locality(local=(0, 1)),)),
        ConfigError,
        r"locality\.local=\[0, 1\] are all experts .* makes the loss 0; leave some to another node, or leave the",
    ),
    (
        lambda: MoE(4, 8, 4, losses=(Locality(local=(0, 1)),)).stand(Site.alone(4)),
        ConfigError,
        r"locality\.local=\[0, 1\] simulates a node in one process; on several ranks .* leave it out",
    ),
    (lambda: locality_loss(torch.ones(2, 3), torch.ones(4)), ShapeError, r"local_E .*\(4,\); scores_RE needs \(3,\)"),
    (lambda: CommunicationBalance(coefficient=-1.0), ConfigError, r"communication_balance\.coefficient=-1\.0 must be"),
    (lambda: CommunicationBalance(groups=2, top_groups=3), ConfigError, r"top_groups=3 must be from 1 to groups=2"),
    (
        lambda: load_balance_loss(torch.ones(2, 3), torch.ones(4)),
        ShapeError,
        r"counts_E .*\(4,\); scores_RE needs \(3,\)",
    ),
]


def choose(name: str, experts: nn.Module, dtype: torch.dtype) -> ExpertBackend:
    return choose_backend(experts, name, dtype=dtype, device=CPU)


def modules() -> ModuleExperts:
    return ModuleExperts(lambda: nn.Linear(4, 4), 2)


class Returning(nn.Module):
    """Returns the same value whatever it is called with: an expert or a router that keeps no contract."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object) -> object:
        return self.value


def routed(expert: int = 0) -> RouterOutput:
    """What a router of two experts gives for three tokens of width 4, all to this expert."""
    routing = TopK(k=1, renormalize=False).build(4, 2)(torch.zeros(3, 4))
    return replace(routing, assignment=replace(routing.assignment, expert_N=torch.full((3,), expert)))


def hash_ids(ids: torch.Tensor) -> object:
    return Hash(vocab_size=5).build(4, 3)(torch.zeros(2, 4), ids)


def differentiated_twice(backend: str) -> object:
    layer = MoE(4, 8, 2, expert="gelu", backend=backend)
    x = torch.randn(5, 4)
    return torch.autograd.functional.hvp(lambda x: layer(x).y.square().sum(), x, torch.ones_like(x))


def any_assignment() -> Assignment:
    index_N = torch.zeros(1, dtype=torch.int64)
    return Assignment(
        token_N=index_N, expert_N=index_N, choice_N=index_N, weight_N=torch.ones(1), num_tokens=1, num_experts=1
    )


@pytest.mark.parametrize(("cause", "kind", "text"), CASES, ids=[text for _, _, text in CASES])
def test_error_names_the_values_and_the_way_out(cause: Cause, kind: type[TurnoutError], text: str) -> None:
    with pytest.raises(kind, match=text):
        cause()


def test_no_raise_of_the_layer_goes_without_a_case() -> None:
    files = [*(p for part in ("routers", "losses", "dispatch", "experts") for p in (SOURCE / part).glob("*.py"))]
    files += [SOURCE / "layers" / "moe.py", SOURCE / "contracts.py", SOURCE / "tensors.py"]
    written = {
        (path.name, node.lineno)
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and "NotImplementedError" not in ast.unparse(node)
    }
    provoked = set()
    for cause, kind, _ in CASES:
        try:
            cause()
        except kind as caught:
            frame = traceback.extract_tb(caught.__traceback__)[-1]
            provoked.add((Path(frame.filename).name, frame.lineno))
    missing = sorted(written - provoked)
    assert not missing, f"add a case to CASES for the error raised at {missing}"


@pytest.mark.parametrize("table", [RouterConfig, CapacityPolicy, Loss, ExpertBackend, Activation])
def test_an_unknown_row_lists_the_rows_and_the_nearest(table: type) -> None:
    known = table.TABLE.names()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=rf"unknown .* '{known[0]}x'; available: {', '.join(known)}; did you mean"):
        table.TABLE[known[0] + "x"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", takers(torch.float32))
def test_a_second_derivative_is_an_error_and_never_a_part_of_one(backend: str) -> None:
    with pytest.raises(ConfigError, match="create_graph=True"):
        differentiated_twice(backend)


TABLES: tuple[Any, ...] = (RouterConfig, CapacityPolicy, Loss, AttentionKind)
SETTINGS: list[Any] = [row for base in TABLES for _, row in base.TABLE.items()]
SETTINGS += [MoEConfig, ModelConfig, DataConfig, OptimizerConfig, ScheduleConfig, LoopConfig, Recipe]
WORDS = [
    (row, field.name, get_args(hint))
    for row in SETTINGS
    for field in fields(row)
    if get_origin(hint := get_type_hints(row)[field.name]) is Literal
]


@pytest.mark.parametrize(("row", "name", "legal"), WORDS, ids=[f"{row.__name__}.{name}" for row, name, _ in WORDS])
def test_a_misspelt_word_is_an_error_from_python_too(row: Any, name: str, legal: tuple[str, ...]) -> None:
    text = rf"{row.__name__}\.{name}='{legal[0]}x' must be one of: {', '.join(legal)}; did you mean '{legal[0]}'\?"
    with pytest.raises(ConfigError, match=text):
        row(**{name: legal[0] + "x"})


MISFITS: dict[Any, tuple[Any, ...]] = {
    int: (2.5, 2.0, "2", True, None, torch.tensor(2)),
    float: ("0.5", True, None, 1j),
    bool: (1, "true", None),
    str: (3, None, True),
}
SCALARS = [
    (row, field.name, get_type_hints(row)[field.name])
    for row in SETTINGS
    for field in fields(row)
    if get_type_hints(row)[field.name] in MISFITS
]


@pytest.mark.parametrize(("row", "name", "hint"), SCALARS, ids=[f"{row.__name__}.{name}" for row, name, _ in SCALARS])
def test_a_value_of_the_wrong_type_is_an_error_from_python_too(row: Any, name: str, hint: Any) -> None:
    for value in MISFITS[hint]:
        with pytest.raises(
            ConfigError, match=rf"{row.__name__}\.{name}=.* must be (an integer|a number|a string|true)"
        ):
            row(**{name: value})


def test_a_number_may_be_numpy_s_and_a_whole_one_may_stand_for_any() -> None:
    assert (
        TopK(k=np.int64(3), scale=np.float32(2)).build(4, 3)(torch.zeros(2, 4), top_k=np.int64(2)).assignment.top_k == 2
    )
    assert TopK(scale=2) == TopK(scale=2.0)


def test_every_row_is_checked_as_it_is_made() -> None:
    assert len(WORDS) > 12
    assert len(SCALARS) > 60
    assert all(issubclass(row, Settings) for row in SETTINGS)


def test_every_refusal_names_a_backend_that_does_not_refuse() -> None:
    for experts in (FFNExperts(4, 4, 2), QuantizedFFNExperts(4, 4, 2), Float8FFNExperts(4, 4, 2), modules()):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for device in (CPU, torch.device("cuda")):
                answers = available_backends(experts, dtype=dtype, device=device)
                ways_out = [name for name, reason in answers.items() if not reason]
                for reason in filter(None, answers.values()):
                    assert any(f"backend='{name}'" in reason for name in ways_out), reason


def test_a_row_cannot_be_registered_twice_or_be_named_when_it_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"loss 'router_z' is registered twice"):
        Loss.TABLE.register("router_z")(RouterZ)
    with pytest.raises(ConfigError, match=r"is not a registered loss; available: "):
        Loss.TABLE.name_of(LoadBalance.__base__)  # type: ignore[arg-type]

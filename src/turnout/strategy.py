"""Strategy: how a model is laid out on devices; the one word planner, tuner, layers and command line share."""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import gcd
from typing import Any, Literal, get_args, get_type_hints

from turnout.errors import ConfigError
from turnout.registry import nearest

Precision = Literal["fp32", "fp16", "bf16", "fp8", "fp4"]
WirePrecision = Literal["", "fp32", "fp16", "bf16", "fp8", "fp4"]
ELEMENT_BYTES: dict[str, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "fp4": 0.5}
_COUNTS = ("tp", "tp_overlap", "cp", "pp", "virtual_stages", "ep", "etp", "overlap", "micro_batch")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One layout. Attention lives on tp * cp * dp * pp ranks, experts on etp * ep * edp * pp of the same ranks.

    Source of the folded axes: Liu et al. 2025, MoE Parallel Folding, arXiv:2504.14960.
    """

    dp: int = 0  # data-parallel ranks of the dense part; 0 derives it from the world
    tp: int = 1  # tensor parallel ranks of attention and dense layers
    sequence_parallel: bool = False  # norms and residual sharded over tp, all-gather + reduce-scatter for all-reduce
    tp_overlap: int = 1  # chunks of sequence parallel's gathers and sums, hidden behind products; 1: none
    cp: int = 1  # context parallel ranks: each has 1/cp of every sequence
    cp_kind: Literal["ring", "alltoall"] = "ring"  # keys and values round a ring, or heads exchanged (Ulysses)
    pp: int = 1  # pipeline stages
    virtual_stages: int = 1  # model chunks a pipeline rank holds
    schedule: Literal["1f1b", "interleaved", "zero_bubble", "dualpipe", "gpipe"] = "1f1b"  # of the pipeline
    scatter_gather: bool = False  # each tp rank sends 1/tp over a stage boundary; sequence parallel does so by itself
    ep: int = 1  # expert parallel ranks: each has 1/ep of the experts
    etp: int = 1  # expert tensor parallel ranks: each has 1/etp of an expert (slices); with tp=1 the axes are folded
    expert_copies: int = 0  # more places a layer for copies of its most loaded experts, over all ep ranks (EPLB)
    folded: bool = False  # expert axes ignore tp and cp and take neighbouring ranks; else ep runs along dp
    shard_tokens: bool = False  # each tp rank dispatches 1/tp of the tokens; sequence parallel does so by itself
    zero: Literal[0, 1, 2, 3] = 0  # sharded over dp: 1 optimizer, 2 + gradients, 3 + parameters (FSDP)
    zero_size: int = 0  # ranks a ZeRO shard is spread over (HSDP when fewer than all); 0: all of dp
    zero_sum: Literal["micro_batch", "step"] = "micro_batch"  # when ZeRO-3 sums gradients; step: whole till then
    # light: norms, up-projections of latent attention, gated activations
    recompute: Literal["none", "light", "selective", "full"] = "none"  # what backward computes again
    kept_precision: Literal["", "fp8"] = ""  # of products' inputs kept for backward under light recomputation
    alltoall: str = "flat"  # name of the all-to-all program
    overlap: int = 1  # chunks whose exchange and computation overlap (Tutel's d); 1: none
    adaptive_r: int = -1  # Tutel's r: parts an expert computes in, a divisor of etp; 0: tokens stay; -1: etp
    micro_batch: int = 1  # sequences of one micro-batch of one data-parallel rank
    precision: Precision = "bf16"  # of matrix products
    dispatch_precision: WirePrecision = ""  # of rows sent to experts; "": that of activations
    grad_precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of gradients on the wire

    def __post_init__(self) -> None:
        for name, legal in _legal_values().items():
            value = getattr(self, name)
            if value not in legal:
                words = [str(word) or '""' for word in legal]
                hint = nearest(str(value), words)
                raise ConfigError(f"strategy.{name}={value!r} must be one of: {', '.join(words)}{hint}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"strategy.{name}={getattr(self, name)} must be at least 1; nearest legal: 1")
        for name in ("dp", "zero_size", "expert_copies"):
            if getattr(self, name) < 0:
                raise ConfigError(f"strategy.{name}={getattr(self, name)} must be at least 0; nearest legal: 0")
        if self.zero_sum == "step" and self.zero != 3:
            raise ConfigError(
                f"strategy.zero_sum='step' says how often zero=3 sums gradients, and zero={self.zero}; "
                "nearest legal: 'micro_batch'"
            )
        if self.kept_precision and self.recompute != "light":
            raise ConfigError(
                f"strategy.kept_precision={self.kept_precision!r} needs recompute='light' (it is {self.recompute!r}); "
                'nearest legal: ""'
            )
        legal = (-1, *legal_parts(self.etp))
        if self.adaptive_r not in legal:
            near = min(legal, key=lambda parts: (abs(parts - self.adaptive_r), parts))
            raise ConfigError(
                f"strategy.adaptive_r={self.adaptive_r} must be 0 or divide etp={self.etp} (or -1: all of it); "
                f"nearest legal: {near}"
            )
        if self.expert_copies and self.ep == 1:
            raise ConfigError(
                f"strategy.expert_copies={self.expert_copies} with ep=1: every rank has all experts; nearest legal: 0, "
                "or ep=2"
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule == "interleaved" and self.virtual_stages < 2:
            raise ConfigError("strategy.virtual_stages=1 is not interleaved; nearest legal: 2, or schedule='1f1b'")
        if self.schedule in ("1f1b", "gpipe") and self.virtual_stages > 1:
            raise ConfigError(
                f"strategy.virtual_stages={self.virtual_stages} needs schedule='interleaved'; "
                f"nearest legal with {self.schedule!r}: 1"
            )
        if self.virtual_stages > 1 and self.pp == 1:
            raise ConfigError(
                f"strategy.virtual_stages={self.virtual_stages} cuts the stages of a pipeline, and pp=1 has none; "
                "nearest legal: virtual_stages=1, schedule='1f1b', or pp=2"
            )
        if self.schedule in ("zero_bubble", "gpipe") and self.pp == 1:
            raise ConfigError(
                f"strategy.schedule={self.schedule!r} is of a pipeline, and pp=1 has none; "
                "nearest legal: '1f1b', or pp=2"
            )
        if self.schedule == "dualpipe" and self.pp % 2:
            raise ConfigError(f"strategy.pp={self.pp} must be even under dualpipe; nearest legal: {self.pp + 1}")
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError("strategy.sequence_parallel=True needs tp of at least 2; nearest legal: False")
        if self.tp_overlap > 1 and not self.sequence_parallel:
            raise ConfigError(
                f"strategy.tp_overlap={self.tp_overlap} cuts the gathers and sums of sequence_parallel, which is off; "
                "nearest legal: 1, or sequence_parallel=True"
            )

    @property
    def tokens_sharded(self) -> bool:
        """Whether each tp rank dispatches its own 1/tp of the tokens, instead of all of them."""
        return self.shard_tokens or self.sequence_parallel or self._slices_data

    @property
    def _slices_data(self) -> bool:
        """Without tensor parallel ranks those of a slice are data-parallel: neighbours, each with its own tokens."""
        return self.tp == 1 and self.etp > 1

    @property
    def expert_parts(self) -> int:
        """Ranks that rows for one expert go to, each with a part of its hidden width; 0: tokens stay."""
        return self.etp if self.adaptive_r < 0 else self.adaptive_r

    @property
    def activation_bytes(self) -> float:
        """Bytes of one activation element between layers: at least 2, for nothing accumulates in fp8."""
        return max(2.0, ELEMENT_BYTES[self.precision])

    @property
    def dispatch_bytes(self) -> float:
        """Bytes of one element of a row sent to an expert, without its scales."""
        return ELEMENT_BYTES[self.dispatch_precision] if self.dispatch_precision else self.activation_bytes

    def world(self) -> int:
        """Devices of the job once dp is known. Raises: ConfigError while dp is 0."""
        if self.dp == 0:
            raise ConfigError("strategy.dp=0 is not resolved yet; call check(world, ...) for it")
        return self.tp * self.cp * self.pp * self.dp

    def edp(self) -> int:
        """Copies of each expert: data-parallel ranks of the expert part."""
        return self.world() // (self.ep * self.etp * self.pp)

    def places(self, num_experts: int) -> int:
        """Experts on the rank that holds most of a layer's, copies counted."""
        return -(-(num_experts + self.expert_copies) // self.ep)

    def check(
        self,
        world: int,
        *,
        num_experts: int = 0,
        num_layers: int = 0,
        num_heads: int = 0,
        seq_len: int = 0,
        global_batch: int = 0,
        uneven: bool = False,
    ) -> "Strategy":
        """This strategy with dp filled in, once it is legal for the job. What is 0 is unknown and not checked;
        num_experts is the exception: 0 is a dense model.

        `global_batch` counts sequences. `uneven`: some ranks may hold one expert more than others, as the layers and
        the planner can; the tuner takes all alike.
        Raises: ConfigError naming the field, its value and the nearest legal one.
        """
        resolved = self._with_dp(world, num_heads)
        resolved._check_experts(world, num_experts, uneven=uneven)
        if num_layers:
            resolved._check_layers(num_layers)
        if num_heads:
            _must_divide("tp", self.tp, "num_heads", num_heads)
            if self.cp_kind == "alltoall":
                _must_divide("cp", self.cp, "num_heads / tp", num_heads // self.tp)
        if seq_len:
            _must_divide("cp", self.cp, "seq_len", seq_len)
        sequences = resolved.dp * self.micro_batch
        if global_batch % sequences:
            legal = max(1, round(global_batch / sequences)) * sequences
            raise ConfigError(
                f"global_batch={global_batch} must be a multiple of strategy.dp * micro_batch={sequences}; "
                f"nearest legal: {legal}"
            )
        if self.zero_size:
            _must_divide("zero_size", self.zero_size, "dp * cp", resolved.dp * self.cp)
        return resolved

    def _with_dp(self, world: int, num_heads: int) -> "Strategy":
        dense = self.tp * self.cp * self.pp
        if world < 1 or world % dense:
            legal = max(dense, round(world / dense) * dense)
            raise ConfigError(
                f"strategy.tp={self.tp} * cp={self.cp} * pp={self.pp} = {dense} must divide world={world}; "
                f"nearest legal: {self._dividing(world, num_heads)}world={legal}"
            )
        if self.dp not in (0, world // dense):
            raise ConfigError(
                f"strategy.dp={self.dp} times tp * cp * pp = {dense} must be world={world}; "
                f"nearest legal: {world // dense}"
            )
        return replace(self, dp=world // dense, folded=self.folded or self._slices_data)

    def _dividing(self, world: int, num_heads: int) -> str:
        """The nearest values of tp, cp and pp that divide the world, one changed at a time; empty if none does."""
        near = []
        for name in ("tp", "cp", "pp"):
            value = getattr(self, name)
            room, rest = divmod(world, self.tp * self.cp * self.pp // value)
            if value > 1 and room and not rest:
                near.append(f"{name}={nearest_divisor(value, gcd(room, num_heads) if name == 'tp' else room)}")
        return ", or ".join([*near, ""])

    def _check_experts(self, world: int, num_experts: int, *, uneven: bool) -> None:
        if num_experts == 0:
            for name in ("ep", "etp"):
                if getattr(self, name) > 1:
                    raise ConfigError(f"strategy.{name}={getattr(self, name)} needs experts; nearest legal: 1")
            return
        room = world // self.pp // self.etp if self.folded else self.dp * self.cp
        if uneven and self.ep > num_experts:
            raise ConfigError(
                f"strategy.ep={self.ep} must not exceed num_experts={num_experts}: each rank holds at least one; "
                f"nearest legal: {gcd(num_experts, max(1, room))}, and more ranks share an expert by etp"
            )
        if not uneven:
            _must_divide("ep", self.ep, "num_experts", num_experts, gcd(num_experts, max(1, room)))
        most = num_experts * (self.ep - 1)
        if self.expert_copies > most:
            raise ConfigError(
                f"strategy.expert_copies={self.expert_copies} must not exceed {most}: each of {num_experts} experts "
                f"lies at most once on each of ep={self.ep} ranks; nearest legal: {most}"
            )
        if self.folded:
            ranks, held = world // self.pp, self.ep * self.etp
            if ranks % held:
                # ep must divide the experts too
                ep = 0 if uneven or ranks % self.etp else nearest_divisor(self.ep, gcd(num_experts, room))
                near = ep * self.etp or nearest_divisor(held, ranks)
                raise ConfigError(f"strategy.ep * etp={held} must divide world / pp={ranks}; nearest legal: {near}")
            # each piece of an expert would need tokens that only some of its ranks have
            if not self.tokens_sharded and self.etp not in (1, self.tp):
                near = min((1, self.tp), key=lambda legal: (abs(legal - self.etp), -legal))
                raise ConfigError(
                    f"strategy.etp={self.etp} needs tokens sharded over tp={self.tp}; nearest legal: {near}"
                )
            return
        if self.etp not in (1, self.tp):
            near = min((1, self.tp), key=lambda legal: abs(legal - self.etp))
            raise ConfigError(f"strategy.etp={self.etp} must be 1 or tp={self.tp} unless folded; nearest legal: {near}")
        hint = "" if self.tp == 1 else "; with folded=True experts take tensor-parallel ranks too"
        _must_divide("ep", self.ep, "dp * cp", room, gcd(num_experts, room), hint)

    def _check_layers(self, num_layers: int) -> None:
        chunks = self.pp * self.virtual_stages
        if chunks > num_layers:
            legal = max(1, num_layers // self.pp)
            raise ConfigError(
                f"strategy.pp={self.pp} * virtual_stages={self.virtual_stages} = {chunks} must not exceed "
                f"num_layers={num_layers}; nearest legal: pp={min(self.pp, num_layers)}, virtual_stages={legal}"
            )


@lru_cache(maxsize=1)
def _legal_values() -> dict[str, tuple[Any, ...]]:
    """Legal values of the fields that have a list of them; a search makes thousands of layouts."""
    hints = get_type_hints(Strategy)
    return {field.name: get_args(hints[field.name]) for field in fields(Strategy) if get_args(hints[field.name])}


def legal_parts(etp: int) -> tuple[int, ...]:
    """The r of `adaptive_r` that experts in `etp` slices can have, in order: 0 and the divisors."""
    return (0, *(parts for parts in range(1, etp + 1) if etp % parts == 0))


def nearest_divisor(value: int, total: int) -> int:
    """The divisor of `total` closest to `value`, the smaller of two equally close."""
    divisors = [d for d in range(1, int(total**0.5) + 1) if total % d == 0]
    return min({*divisors, *(total // d for d in divisors)}, key=lambda d: (abs(d - value), d))


def _must_divide(name: str, value: int, of: str, total: int, also: int = 0, hint: str = "") -> None:
    """Refuse a `value` that does not divide `total`; the nearest legal one divides `also`, which divides `total`."""
    if total % value:
        near = nearest_divisor(value, also or total)
        raise ConfigError(f"strategy.{name}={value} must divide {of}={total}; nearest legal: {near}{hint}")

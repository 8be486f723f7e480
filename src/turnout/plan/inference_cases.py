"""Published figures of inference, asked of the planner: nothing here was fitted, and each error is printed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from turnout.plan.inference import Inference, infer
from turnout.plan.inference_load import decode_load
from turnout.plan.inference_pass import ForwardPass
from turnout.plan.model import ModelShape
from turnout.plan.serving import Serving
from turnout.plan.shapes import gpt, with_experts
from turnout.strategy import Strategy

DEEPSPEED = "DeepSpeed-MoE, Rajbhandari et al. 2022, arXiv:2201.05596"
SGLANG = "SGLang team 2025, lmsys.org/blog/2025-05-05-large-scale-ep"
DEEPSEEK = "DeepSeek 2025, open-infra-index, day 6 (inference system overview)"
LIMITS = "DeepSeek-AI 2025, arXiv:2505.09343, section 2.3.2"


@dataclass(frozen=True, kw_only=True)
class InferenceCase:
    """One published figure and the deployment it is of."""

    id: str
    quantity: str
    unit: str
    value: float
    relation: Literal["equal", "below", "above"] = "equal"  # of what is measured to `value`
    serving: Serving
    answer: Callable[[Inference], float]
    source: str
    measured: bool = True  # on machines; else worked out by its authors
    assumed: str = ""  # what the source leaves open, and what stands for it


@dataclass(frozen=True, kw_only=True)
class InferenceAnswer:
    """A case and what the planner says."""

    case: InferenceCase
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.case.value - 1

    @property
    def holds(self) -> bool | None:
        """Whether a bound is met; nothing for what is no bound."""
        if self.case.relation == "equal":
            return None
        return self.predicted < self.case.value if self.case.relation == "below" else self.predicted > self.case.value

    def to_json(self) -> dict[str, Any]:
        """A row of `plan inference --published --json`."""
        names = ("id", "quantity", "unit", "value", "relation", "measured", "source", "assumed")
        return {name: getattr(self.case, name) for name in names} | {
            "predicted": self.predicted,
            "error": self.error if self.case.relation == "equal" else None,
            "holds": self.holds,
        }


def answers() -> tuple[InferenceAnswer, ...]:
    """Every case, answered."""
    return tuple(InferenceAnswer(case=case, predicted=case.answer(infer(case.serving))) for case in cases())


def deepspeed_moe(*, layers: int, dim: int, heads: int) -> ModelShape:
    """A model of DeepSpeed-MoE's table 6: every second FFN is 128 experts, of which a token meets one."""
    dense = gpt(layers=layers, dim=dim, heads=heads, vocab=50_304)
    return replace(
        with_experts(dense, experts=128, top_k=1, hidden=4 * dim), moe_every=2, expert_bias=True,
        name=f"deepspeed-moe-{layers}x{dim}",
    )  # fmt: skip


def cases() -> tuple[InferenceCase, ...]:
    """All figures."""
    return (*_deepspeed(), *_prefill(), *_decode(), _network_limit())


def _deepspeed() -> tuple[InferenceCase, ...]:
    """The claims that are numbers; its latencies are in figures alone."""
    # 30 layers of 8192: table 6 has the layers of two rows swapped, and only so are there 1,046.9 B parameters
    trillion = Serving(
        model=deepspeed_moe(layers=30, dim=8192, heads=64), cluster="dgx-a100", devices=256, batch=8, context=128,
        new_tokens=128,
        strategy=Strategy(
            tp=8, ep=128, etp=2, folded=True, shard_tokens=True, alltoall="hierarchical", precision="fp16"
        ),
    )  # fmt: skip
    assumed = "batch 8, prompts of 128 tokens; experts sliced over 2 devices, there being 128 on 256"
    return (
        InferenceCase(
            id="deepspeed-1t", quantity="time of a token", unit="ms", value=25.0, relation="below", serving=trillion,
            answer=lambda found: 1e3 * found.tpot_s, source=f"{DEEPSPEED}, abstract, section 5", assumed=assumed,
        ),
        InferenceCase(
            id="deepspeed-52b-scaling", quantity="throughput of 64 devices over that of 8", unit="x", value=8.0,
            relation="above", serving=_fifty_two(64), answer=lambda found: found.decode_tokens_per_s / _at_eight(),
            source=f"{DEEPSPEED}, section 5 (super-linear)", assumed="batch 8 a device, prompts of 128 tokens",
        ),
    )  # fmt: skip


def _fifty_two(devices: int) -> Serving:
    return Serving(
        model=deepspeed_moe(layers=24, dim=2048, heads=16), cluster="dgx-a100", devices=devices, batch=8 * devices,
        context=128, new_tokens=128, strategy=Strategy(ep=devices, alltoall="hierarchical", precision="fp16"),
    )  # fmt: skip


def _at_eight() -> float:
    return infer(_fifty_two(8)).decode_tokens_per_s


def _prefill() -> tuple[InferenceCase, ...]:
    """16,384 tokens a device, experts over 32 devices with 32 copies of busy ones, two batches overlapped."""
    rows = ((1024, 57_674.0, SGLANG), (2048, 54_543.0, SGLANG), (4096, 50_302.0, SGLANG))
    published = [(f"sglang-prefill-{length}", "dgx-h100", length, value, where) for length, value, where in rows]
    normalised = f"{SGLANG}: DeepSeek's profile, as they normalise it"
    published.append(("deepseek-profile-prefill", "h800", 4096, 62_713.0, normalised))
    return tuple(
        InferenceCase(
            id=name, quantity="prompt tokens a node", unit="tok/s", value=value, source=where,
            answer=lambda found: 8 * found.prefill_tokens_per_s / found.serving.world,
            serving=Serving(
                model="deepseek-v3", cluster=cluster, devices=32, batch=16_384 // length * 32, context=length,
                prefill_batch=16_384 // length, new_tokens=1, redundant_experts=32,
                strategy=_deepseek_layout(32, alltoall="node_dedup"),
            ),
        )
        for name, cluster, length, value, where in published
    )  # fmt: skip


def _decode() -> tuple[InferenceCase, ...]:
    def per_node(found: Inference) -> float:
        return 8 * found.decode_tokens_per_s / found.serving.world

    return (
        InferenceCase(
            id="sglang-decode", quantity="answer tokens a node", unit="tok/s", value=22_282.0, source=SGLANG,
            answer=per_node, assumed="the batch of 256 is a device's: of a node it would be a token every 11 ms",
            serving=Serving(
                model="deepseek-v3", cluster="dgx-h100", devices=72, batch=256 * 72, context=2000, new_tokens=1,
                redundant_experts=32, one_sided=True, strategy=_deepseek_layout(72),
            ),
        ),
        InferenceCase(
            id="deepseek-service-decode", quantity="answer tokens a node", unit="tok/s", value=14_800.0,
            source=DEEPSEEK, answer=per_node,
            assumed="a day's mean, as if steady: 88 sequences a device, which 21 tokens/s each make of it",
            serving=Serving(
                model="deepseek-v3", cluster="h800", devices=144, batch=88 * 144, context=4989, new_tokens=1,
                redundant_experts=32, one_sided=True, strategy=_deepseek_layout(144),
            ),
        ),
    )  # fmt: skip


def _deepseek_layout(ranks: int, *, alltoall: str = "flat") -> Strategy:
    """Attention on every device, experts over all; the exchange of one half behind the other."""
    return Strategy(ep=ranks, overlap=2, alltoall=alltoall, precision="fp8", dispatch_precision="fp8")


def _network_limit() -> InferenceCase:
    """Rows alone: 32 tokens for 9 experts (8 and a shared one), 3 bytes an element, 50 GB/s, 2 batches, 61 layers."""
    serving = Serving(
        model="deepseek-v3", cluster="h800", devices=256, batch=64 * 256, context=1, one_sided=True,
        strategy=Strategy(ep=256, precision="fp8", dispatch_precision="fp8"),
    )  # fmt: skip

    def wire_ms(found: Inference) -> float:
        one = ForwardPass(serving=found.serving, load=decode_load(found.serving))
        return 1e3 * sum(one.exchange_s(layer) for layer in found.serving.shape.sparse_layers)

    return InferenceCase(
        id="deepseek-network-limit", quantity="exchanges of a token", unit="ms", value=14.76, serving=serving,
        answer=wire_ms, source=LIMITS, measured=False,
        assumed="theirs is a product of sizes, not a measurement: no latencies",
    )  # fmt: skip

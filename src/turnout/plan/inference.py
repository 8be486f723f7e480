"""Latency and throughput of a deployment: the first token, each further one, and what bounds them.

An estimate of the limit: host time between kernels, sampling, queues and scheduling are not in it.
"""

from dataclasses import dataclass
from typing import Any

from turnout.plan.inference_experts import touched, touched_at_busiest
from turnout.plan.inference_load import decode_load, prefill_load
from turnout.plan.inference_memory import ServingMemory, serving_memory
from turnout.plan.inference_pass import Forward, ForwardPass, forward
from turnout.plan.serving import Serving


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What a deployment does."""

    prefill: Forward  # of the prompts every rank takes at once
    decode: Forward  # of one token of every sequence
    memory: ServingMemory
    experts_touched: float  # of a sparse layer by one decoding step, over all ranks, on average; 0: no experts
    experts_read: float  # of these, by the rank that reads most
    limit_s: float  # of a decoding step if memory were read at its data sheet's bandwidth, and all else free
    prompts: int  # prefilled at once, over all devices
    serving: Serving

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token of a prompt that waits for no other."""
        return self.prefill.total_s

    @property
    def tpot_s(self) -> float:
        """Seconds for each further token."""
        return self.decode.total_s

    @property
    def request_s(self) -> float:
        """Seconds of a whole answer."""
        return self.ttft_s + (self.serving.new_tokens - 1) * self.tpot_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens that all devices decode, doing nothing else."""
        return self.serving.batch / self.tpot_s

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of prompts that all devices prefill, doing nothing else."""
        return self.prompts * self.serving.context / self.ttft_s

    @property
    def served_tokens_per_s(self) -> float:
        """Tokens of answers where the same devices prefill each batch, then decode it."""
        batch, new = self.serving.batch, self.serving.new_tokens
        return batch * new / (batch / self.prompts * self.ttft_s + (new - 1) * self.tpot_s)

    @property
    def fits(self) -> bool:
        """Whether a device holds its part."""
        return self.memory.fits(self.serving.machine.device.memory_bytes)

    def to_json(self) -> dict[str, Any]:
        """What `plan inference --json` prints."""
        names = (
            "ttft_s", "tpot_s", "request_s", "decode_tokens_per_s", "prefill_tokens_per_s", "served_tokens_per_s",
            "limit_s", "experts_touched", "experts_read", "fits",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "decode_tokens_per_s_per_device": self.decode_tokens_per_s / self.serving.world,
            "bandwidth_share": self.limit_s / self.tpot_s,
            "prefill": vars(self.prefill),
            "decode": vars(self.decode),
            "memory": vars(self.memory) | {"total_bytes": self.memory.total_bytes},
        }


def infer(serving: Serving) -> Inference:
    """What the deployment does.

    Raises: ConfigError if the layout is not legal for the model and the devices.
    """
    shape, load, first = serving.shape, decode_load(serving), prefill_load(serving)
    decode, sparse = forward(serving, load), bool(shape.num_experts)
    one = ForwardPass(serving=serving, load=load)
    ranks, tokens = serving.layout.ep, one.routed()[1] * one.chunks
    experts, top_k = shape.num_experts, shape.top_k
    return Inference(
        prefill=forward(serving, first),
        decode=decode,
        memory=serving_memory(serving),
        experts_touched=touched(experts, top_k, serving.batch) if sparse else 0.0,
        experts_read=touched_at_busiest(experts, top_k, tokens, ranks) if sparse else 0.0,
        limit_s=decode.read_bytes / serving.machine.device.memory_bytes_per_s,
        prompts=first.all_sequences,
        serving=serving,
    )

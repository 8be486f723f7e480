"""A step's time by cause, largest first, and what the devices make of it."""

from dataclasses import dataclass, fields

from turnout.plan.job import Job
from turnout.plan.time import StepTime
from turnout.topology import Cluster

MEANING = {
    "compute": "products, attention, element-wise work, recomputation",
    "tp": "exposed communication of tensor and sequence parallelism",
    "cp": "exposed communication of context parallelism",
    "ep": "exposed all-to-all of the experts",
    "pp": "exposed sends between pipeline stages",
    "dp": "exposed reduction of gradients, gathers of sharded parameters",
    "tax": "computation slowed by communication beside it",
    "launch": "the device waits for the host",
    "bubble": "the pipeline's idle time, other stages' surplus included",
    "optimizer": "the update of parameters and moments",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One cause of a step's time on the slowest pipeline stage."""

    name: str
    seconds: float
    share: float  # of the step
    meaning: str


def waterfall(step: StepTime) -> tuple[Part, ...]:
    """The parts of a step that take any time; they sum to `step_s`."""
    names = [field.name for field in fields(step) if field.name != "step_s"]
    parts = [(name.removesuffix("_s"), getattr(step, name)) for name in names]
    return tuple(
        Part(name=name, seconds=seconds, share=seconds / step.step_s, meaning=MEANING.get(name, ""))
        for name, seconds in parts
        if seconds > 0
    )


def peak_flops_per_s(cluster: Cluster) -> float:
    """The peak that shares of a peak are of: bf16, or fp16 where the device has no bf16; FLOP/s of one device."""
    return cluster.device.peak_flops_per_s.bf16 or cluster.device.peak_flops_per_s.fp16


def mfu(step: StepTime, job: Job, cluster: Cluster) -> float:
    """Model FLOPs utilisation: share of the bf16 peak, all pairs of a sequence counted, recomputation not.

    Source of the definition: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    return step.model_flops_per_s(job) / peak_flops_per_s(cluster)

"""What training frameworks differ in that the planner must know: facts of their code, not fitted numbers."""

from dataclasses import dataclass, replace
from typing import Literal

from turnout.registry import Table


@dataclass(frozen=True, kw_only=True)
class Framework:
    """Byte counts are per element; those that ZeRO divides are marked."""

    name: str = ""  # under which it is registered, whatever is changed in it after that
    weight_bytes: float = 2.0  # of a parameter the forward pass reads
    gradient_bytes: float = 4.0  # of an accumulated gradient (ZeRO-2 and 3)
    optimizer_bytes: float = 12.0  # master weight and two moments (ZeRO-1 to 3)
    data_parallel_bytes: float = 0.0  # of buckets of gradients, there only with data parallel ranks and without ZeRO
    zero_kept_bytes: float = 0.0  # of the buffers that gather a parameter once the optimizer is sharded, after the peak
    zero_shard_bytes: float = 0.0  # and more of it in a rank's shard
    logit_bytes: float = 4.0  # kept of one logit at the peak
    # moved for one logit by the loss, and by its gradient: a copy in fp32, then maximum, difference, exponential, sum
    # and quotient, kernel by kernel; Megatron-LM core/tensor_parallel/cross_entropy.py
    loss_moves: tuple[float, float] = (38.0, 14.0)
    wgrad_bytes: float = 0.0  # of an output before it is added to the accumulated gradient, for the largest matrices
    flash_attention: bool = True  # scores are never written to memory
    attention_rate: float = 1.0  # of its fused attention kernel, over the best of the device's generation
    dropout: bool = False  # masks are kept
    fused_activation: bool = True  # a gated activation keeps its two inputs, not also the activated gate
    permuted_copies: float = 1.0  # copies of the routed rows kept beside the experts' input
    stage_balance: Literal["layers", "flops", "flops over"] = "layers"  # what pipeline stages have equal numbers of
    selective: Literal["scores", "products"] = "scores"  # what selective recomputation drops
    key_copies: int = 0  # of keys and values, kept beside those that attention reads
    gathered_inputs: bool = False  # under tp, a block at work holds gathered inputs and outputs not yet summed
    gather_buffer_bytes: float = 0.0  # of one element of the residual stream: buffers kept for all-gathers under tp
    light_recompute: bool = False  # has recomputation of norms, up-projections and gated activations alone
    schedules: tuple[str, ...] = ("1f1b", "interleaved")  # of its pipelines
    reshards: bool = True  # under ZeRO-3 parameters and gradients are sharded again between the passes of a pipeline
    scatter_gather: bool = False  # each tensor-parallel rank sends a share over a stage boundary
    overlap_tp: bool = False  # tensor-parallel communication runs in chunks beside the products
    overlap_pp: bool = True  # interleaved stages send while they compute
    overlap_dp: bool = True  # gradients are reduced while backward runs
    # under ZeRO-1 whole gradients are summed on every rank, and parameters gathered, in one collective each after the
    # last backward pass
    zero_sums: bool = False
    bucket_params: float = 40e6  # of one rank that one collective reduces or gathers: Megatron-Core's bucket_size
    block_collectives: int = 0  # collectives that reduce or gather a block, whatever its size; 0: by bucket_params
    wire_precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of gradients on the wire
    sequence_parallel: bool = True  # norms are sharded over tp unless the layout says otherwise


FRAMEWORKS: Table[Framework] = Table("framework")


def _add(name: str, framework: Framework) -> Framework:
    return FRAMEWORKS.register(name)(replace(framework, name=name))


# https://github.com/NVIDIA/Megatron-LM core/distributed, core/optimizer: bf16 weights, fp32 gradients and master
# --recompute-modules layernorm mla_up_proj moe_act: its core/transformer/transformer_config.py
_CORE = Framework(wgrad_bytes=2.0, light_recompute=True)
_add("megatron-core", _CORE)
# https://github.com/NVIDIA-NeMo: megatron-core with user buffers, which overlap tensor-parallel communication,
# and --cross-entropy-loss-fusion: a copy in fp32 and two kernels
_add("nemo", replace(_CORE, overlap_tp=True, wire_precision="bf16", loss_moves=(18.0, 10.0)))
# DeepSeek-V3's own code, arXiv:2412.19437: DualPipe (section 3.2.1), light recomputation (3.2.3), moments in bf16
# beside master weights and gradients in fp32 (3.3.3); a row's gate weight is taken to be applied before its expert's
# last matrix, as Megatron does, so that no copy of the rows is kept for it. Table 4 of arXiv:2505.09343 has passes,
# idle time and "opt" alone, so that gradients and parameters are exchanged in the last of these
_add(
    "deepseek",
    replace(
        _CORE, optimizer_bytes=8.0, permuted_copies=0.0, overlap_dp=False,
        schedules=("1f1b", "zero_bubble", "dualpipe"),
    ),
)  # fmt: skip
# the code of arXiv:2104.04473 (2021): scores in memory, dropout, all-reduce after the last backward
_LEGACY = Framework(
    flash_attention=False, dropout=True, logit_bytes=6.0, overlap_dp=False, overlap_pp=False, scatter_gather=True,
    sequence_parallel=False, wire_precision="fp16",
)  # fmt: skip
_add("megatron-2021", _LEGACY)
# the same with arXiv:2205.05198 (2022): what MegaScale (arXiv:2402.15627, section 3) compares with, flash attention
# being one of its own additions
_add("megatron-2022", replace(_LEGACY, sequence_parallel=True, wire_precision="fp32"))
# https://github.com/pytorch/torchtitan: FSDP2 keeps fp32 shards, gathers bf16. Its loss is compiled since pull request
# 1033 of April 2025: a logit is kept in bf16, and as its gradient; all else is computed in passing
TORCHTITAN = _add(
    "torchtitan",
    Framework(
        # its --pipeline_parallel_schedule takes those of torch.distributed.pipelining
        schedules=("1f1b", "interleaved", "zero_bubble"),
        loss_moves=(4.0, 4.0),
        weight_bytes=4.0, optimizer_bytes=8.0, logit_bytes=4.0, selective="products", reshards=False,
        # PyTorch's kernel is FlashAttention-2, of which FlashAttention-3 is 1.5 to 2 times as fast: arXiv:2407.08608
        attention_rate=0.6,
        block_collectives=1,  # each block is one unit of FSDP
        gathered_inputs=True,
    ),
)  # fmt: skip
# before, and where nothing is compiled: torch.nn.functional.cross_entropy of a copy in fp32, so that a logit is kept in
# bf16, as fp32, as its log-softmax, and as its gradient
_add("torchtitan-2024", replace(TORCHTITAN, loss_moves=(18.0, 18.0), logit_bytes=14.0))
# https://github.com/huggingface/nanotron: bf16 weights, fp32 accumulators and master weights, stages balanced by FLOPs
NANOTRON = _add(
    "nanotron",
    Framework(
        schedules=("1f1b",),
        data_parallel_bytes=2.0, zero_kept_bytes=4.0, zero_shard_bytes=2.0, logit_bytes=8.0, fused_activation=False,
        stage_balance="flops", gathered_inputs=True, gather_buffer_bytes=4.0,
        # queries are turned in place: what they were cut from stays, keys and values in it, beside those of attention
        key_copies=1, attention_rate=0.6, overlap_tp=True, overlap_pp=False,
        # buckets of 25 MiB of bf16 gradients without ZeRO, the default of PyTorch's DistributedDataParallel, which it
        # leaves away with ZeRO: src/nanotron/trainer.py, make_ddp and sync_gradients_across_dp(reduce_scatter=False)
        zero_sums=True, bucket_params=25 * 2**20 / 2,
    ),
)  # fmt: skip
# before its pipelines were repaired: the block that reaches a stage's share of the products did not yet end the stage
_add("nanotron-2024", replace(NANOTRON, stage_balance="flops over"))

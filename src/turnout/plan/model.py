"""A model as the planner sees it: sizes only, from which parameters and FLOPs follow."""

from dataclasses import dataclass, fields
from functools import cached_property

from turnout.errors import ConfigError

# fields that may be 0: the part they size is absent
OPTIONAL = {
    "ffn_hidden", "num_experts", "top_k", "expert_hidden", "shared_hidden", "shared_gates", "latent_dim", "dense_first",
    "expert_groups", "top_groups",
    "encoder_layers", "mtp_layers", "learned_positions", "window", "full_every",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MLAShape:
    """Multi-head latent attention. Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1."""

    q_rank: int  # width queries are read from; 0: straight from the hidden state
    kv_rank: int  # width keys and values are read from
    nope_dim: int  # part of a head without position
    rope_dim: int  # part of a head that turns; its key is shared by all heads
    v_dim: int  # width of a head's value


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a transformer, dense or with experts. A sparse layer has experts in place of its dense FFN."""

    name: str = ""  # for messages
    num_layers: int  # decoder blocks
    dim: int  # model width
    vocab_size: int  # rows of the embedding
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads
    head_dim: int  # width of one head
    mla: MLAShape | None = None  # latent attention; none: grouped queries
    ffn_hidden: int = 0  # hidden width of a dense FFN
    gated: bool = True  # FFNs and experts have a third matrix (SwiGLU, GeGLU)
    tied_embeddings: bool = False  # one matrix reads and writes tokens
    num_experts: int = 0  # routed experts of a sparse layer; 0: the model is dense
    top_k: int = 0  # experts a token meets
    expert_hidden: int = 0  # hidden width of a routed expert
    experts_by_layer: tuple[int, ...] = ()  # pyramid: experts of each sparse layer; empty: num_experts in all
    shared_hidden: int = 0  # hidden width of what every token of a sparse layer meets: shared or residual experts
    shared_gates: int = 0  # numbers a token computes to weigh the shared part: Qwen2 1, residual MoE 2
    latent_dim: int = 0  # width the routed experts work in, between two projections they share; 0: dim
    expert_groups: int = 0  # groups of experts that a token's choice is limited over; 0: none
    top_groups: int = 0  # groups a token may choose from
    learned_router: bool = True  # the router has a matrix; a hash router has none
    dense_first: int = 0  # this many first blocks stay dense
    moe_every: int = 1  # every n-th block after them is sparse, so that the last one is
    encoder_layers: int = 0  # blocks of an encoder; with one, decoder blocks attend to it too
    mtp_layers: int = 0  # multi-token-prediction blocks, each with a projection of 2 dim to dim
    learned_positions: int = 0  # rows of a learned position table
    layer_norm: bool = False  # norms have a bias (LayerNorm); else a weight alone (RMSNorm)
    norms_per_layer: int = 2  # norms of width dim in a block
    qkv_bias: bool = False  # queries, keys and values have biases
    out_bias: bool = False  # the output projection of attention has a bias
    ffn_bias: bool = False  # dense and shared FFNs have biases
    expert_bias: bool = False  # routed experts have biases
    router_bias: bool = False  # the router's logits have a learned bias
    sinks: bool = False  # each head has a logit that takes attention and gives nothing
    smear_keys: bool = False  # each key head has a learned share of the key before
    qk_norm: str = "none"  # norm of queries and keys: none, head (one for all heads), full (over all heads)
    window: int = 0  # tokens a windowed block sees; 0: no block is windowed
    full_every: int = 0  # with a window, every n-th block still sees all; 0: none does

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in OPTIONAL else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"model.{field.name}={value} must be at least {least}")
        if self.num_heads % self.num_kv_heads:
            legal = max(n for n in range(1, self.num_kv_heads + 1) if self.num_heads % n == 0)
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; nearest legal: {legal}"
            )
        if self.dense_first > self.num_layers:
            raise ConfigError(f"model.dense_first={self.dense_first} is above num_layers={self.num_layers}")
        if self.num_experts and not (1 <= self.top_k <= self.num_experts and self.expert_hidden):
            raise ConfigError(
                f"model.top_k={self.top_k} must be in 1..{self.num_experts} (num_experts) and "
                f"model.expert_hidden={self.expert_hidden} above 0"
            )
        if len(self.sparse_layers) < self.num_layers + self.encoder_layers and not self.ffn_hidden:
            raise ConfigError("model.ffn_hidden=0, yet some blocks are dense; give their FFN's hidden width")
        if self.mtp_layers and self.encoder_layers:
            raise ConfigError(
                f"model.mtp_layers={self.mtp_layers} is of decoders alone, and encoder_layers={self.encoder_layers}; "
                "nearest legal: mtp_layers=0"
            )
        if self.experts_by_layer and len(self.experts_by_layer) != len(self.sparse_layers):
            raise ConfigError(
                f"model.experts_by_layer has {len(self.experts_by_layer)} entries; "
                f"the model has {len(self.sparse_layers)} sparse layers"
            )

    # --- which layers ---

    @property
    def all_layers(self) -> int:
        """Blocks of encoder and decoder; the encoder's come first. Multi-token-prediction blocks are apart."""
        return self.encoder_layers + self.num_layers

    @cached_property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices, over encoder then decoder, of the blocks that have experts."""
        if not self.num_experts:
            return ()
        stacks = ((0, self.encoder_layers), (self.encoder_layers, self.num_layers))
        return tuple(start + i for start, length in stacks for i in range(length) if self._is_sparse(i))

    def _is_sparse(self, index: int) -> bool:
        offset = index - self.dense_first
        return offset >= 0 and offset % self.moe_every == self.moe_every - 1

    @property
    def may_lie_unevenly(self) -> bool:
        """Whether ranks may hold one expert more than others: layers are alike, and tokens not limited to groups."""
        return not self.experts_by_layer and not self.expert_groups

    def experts_of(self, layer: int) -> int:
        """Routed experts of block `layer`; 0 if it is dense."""
        return self._experts.get(layer, 0)

    @cached_property
    def _experts(self) -> dict[int, int]:
        counts = self.experts_by_layer or (self.num_experts,) * len(self.sparse_layers)
        return dict(zip(self.sparse_layers, counts, strict=True))

    # --- parameters of one part ---

    def _norm(self, width: int) -> int:
        return width * (2 if self.layer_norm else 1)

    def _ffn(self, width: int, hidden: int, bias: bool) -> int:
        up = (2 if self.gated else 1) * hidden
        return width * (up + hidden) + (up + width if bias else 0)

    @cached_property
    def attention_matrix_params(self) -> int:
        """Weights of one attention that are multiplied with activations."""
        if self.mla is None:
            return self.dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        m, heads = self.mla, self.num_heads
        queries = heads * (m.nope_dim + m.rope_dim) * (m.q_rank or self.dim) + m.q_rank * self.dim
        keys = (m.kv_rank + m.rope_dim) * self.dim + heads * (m.nope_dim + m.v_dim) * m.kv_rank
        return queries + keys + self.dim * heads * m.v_dim

    @cached_property
    def attention_params(self) -> int:
        """Parameters of one attention, its biases and inner norms included."""
        rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        small = (rows + 2 * kv_rows) * self.qkv_bias + self.dim * self.out_bias + self.num_heads * self.sinks
        small += self.num_kv_heads * self.smear_keys
        small += {"none": 0, "head": 2 * self.head_dim, "full": rows + kv_rows}[self.qk_norm]
        if self.mla is not None:
            small += self.mla.q_rank + self.mla.kv_rank
        return self.attention_matrix_params + small

    @cached_property
    def dense_ffn_params(self) -> int:
        """Parameters of a dense block's FFN."""
        return self._ffn(self.dim, self.ffn_hidden, self.ffn_bias) if self.ffn_hidden else 0

    @cached_property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return self._ffn(self.latent_dim or self.dim, self.expert_hidden, self.expert_bias)

    @cached_property
    def shared_params(self) -> int:
        """Parameters of a sparse block's shared or residual part and of the latent projections."""
        shared = self._ffn(self.dim, self.shared_hidden, self.ffn_bias) if self.shared_hidden else 0
        return shared + self.shared_gates * self.dim + 2 * self.latent_dim * self.dim

    def router_params(self, layer: int) -> int:
        """Parameters of block `layer`'s router."""
        return self.experts_of(layer) * (self.dim * self.learned_router + self.router_bias)

    def block_params(self, layer: int) -> int:
        """Parameters of block `layer`, its routed experts left out."""
        attentions = 2 if self.encoder_layers and layer >= self.encoder_layers else 1
        params = attentions * self.attention_params + (self.norms_per_layer + attentions - 1) * self._norm(self.dim)
        if self.experts_of(layer):
            return params + self.shared_params + self.router_params(layer)
        return params + self.dense_ffn_params

    def routed_params(self, layer: int) -> int:
        """Parameters of block `layer`'s routed experts, all of them."""
        return self.experts_of(layer) * self.expert_params

    @cached_property
    def mtp_params(self) -> int:
        """Parameters of one multi-token-prediction block without routed experts: a last block and a projection."""
        return self.block_params(self.all_layers - 1) + 2 * self.dim * self.dim + 3 * self._norm(self.dim)

    # --- parameters of the model ---

    @property
    def embedding_params(self) -> int:
        """Token vectors and learned positions."""
        return (self.vocab_size + self.learned_positions) * self.dim

    @property
    def head_params(self) -> int:
        """The output matrix; 0 if it is the embedding's."""
        return 0 if self.tied_embeddings else self.vocab_size * self.dim

    @property
    def looked_up_params(self) -> int:
        """Parameters that are read by index alone, never multiplied."""
        return self.embedding_params - (self.vocab_size * self.dim if self.tied_embeddings else 0)

    @cached_property
    def total_params(self) -> int:
        """All parameters."""
        return self.dense_params + self.expert_total_params

    @cached_property
    def expert_total_params(self) -> int:
        """Parameters of all routed experts."""
        last = self.routed_params(self.all_layers - 1)
        return sum(map(self.routed_params, range(self.all_layers))) + self.mtp_layers * last

    @cached_property
    def dense_params(self) -> int:
        """Parameters that every token meets or looks up: all but routed experts."""
        final_norms = self._norm(self.dim) * (2 if self.encoder_layers else 1)
        blocks = sum(map(self.block_params, range(self.all_layers))) + self.mtp_layers * self.mtp_params
        return self.embedding_params + self.head_params + blocks + final_norms

    @cached_property
    def active_params(self) -> int:
        """Parameters of the model a token meets: `top_k` routed experts a sparse layer, and all that is dense."""
        sparse = len(self.sparse_layers) + self.mtp_layers * bool(self.experts_of(self.all_layers - 1))
        return self.dense_params + sparse * self.top_k * self.expert_params

    # --- floating-point operations, a multiply-add counting as two ---

    def matrix_weights(self, layer: int) -> int:
        """Weights of block `layer` that one token is multiplied with; biases, norms and tables left out."""
        attentions = 2 if self.encoder_layers and layer >= self.encoder_layers else 1
        matrices, weights = 3 if self.gated else 2, attentions * self.attention_matrix_params
        experts = self.experts_of(layer)
        if not experts:
            return weights + matrices * self.dim * self.ffn_hidden
        routed = self.top_k * matrices * (self.latent_dim or self.dim) * self.expert_hidden
        shared = matrices * self.dim * self.shared_hidden + (self.shared_gates + 2 * self.latent_dim) * self.dim
        return weights + routed + shared + experts * self.dim * self.learned_router

    @property
    def attention_flops_per_pair(self) -> int:
        """Operations for one query to meet one key: two products over all heads."""
        width = 2 * self.head_dim if self.mla is None else self.mla.nope_dim + self.mla.rope_dim + self.mla.v_dim
        return 2 * self.num_heads * width

    def keys_per_query(self, layer: int, seq_len: int, *, causal: bool = True) -> float:
        """Keys a query of block `layer` meets, averaged over a sequence; `causal` counts only those it may see."""
        sees_all = not self.window or (self.full_every and layer % self.full_every == self.full_every - 1)
        window = seq_len if sees_all else min(self.window, seq_len)
        own = window - window * (window - 1) / (2 * seq_len) if causal and layer >= self.encoder_layers else window
        return own + (seq_len if self.encoder_layers and layer >= self.encoder_layers else 0)

    def forward_flops_per_token(self, seq_len: int, *, causal: bool = True) -> float:
        """Operations of one token's forward pass at this sequence length, output matrix included.

        `causal=False` counts all pairs of a sequence, as the Megatron papers do. Training is 3 times this, 4 times
        with full recomputation counted.
        """
        heads = (1 + self.mtp_layers) * self.vocab_size * self.dim
        weights = sum(map(self.matrix_weights, range(self.all_layers))) + heads
        weights += self.mtp_layers * (self.matrix_weights(self.all_layers - 1) + 2 * self.dim * self.dim)
        pairs = sum(self.keys_per_query(layer, seq_len, causal=causal) for layer in range(self.all_layers))
        return 2 * weights + self.attention_flops_per_pair * pairs * (1 + self.mtp_layers / self.all_layers)

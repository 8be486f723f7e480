"""The model of a row in the schema of published_cases.json."""

import re
from dataclasses import replace

from turnout.plan.model import MLAShape, ModelShape
from turnout.plan.row_fields import Refused, Row, count
from turnout.plan.shapes import SHAPES, gpt, llama, with_experts


def shape_of(row: Row, models: dict[str, Row]) -> ModelShape:
    """The model of a row: its own dimensions, a named shape, or the file's record of it.

    Raises: Refused if none of the three is there.
    """
    name = str(row.get("model"))
    dims = row.get("dims") or {}
    if not isinstance(dims, dict):
        raise Refused(f"dims={dims!r} is not an object")
    if name in SHAPES:
        shape = SHAPES[name]
    elif "layers" in dims or name in models:
        shape = shape_of_record(dims if "layers" in dims else models[name], name)
    else:
        raise Refused(f"model={name!r} has no dimensions; named shapes: {', '.join(SHAPES.names())}")
    layers = count(row, "n_layers_override", 0)
    if layers:
        # cut models keep one dense block of those in front
        shape = replace(shape, num_layers=layers, dense_first=min(shape.dense_first, 1))
    return replace(shape, mtp_layers=1) if row.get("mtp") else shape


def shape_of_record(record: Row, name: str) -> ModelShape:
    """A model record of the file (`layers`, `hidden`, `heads`, ...) as a shape."""
    layers, dim, heads, vocab = (count(record, key) for key in ("layers", "hidden", "heads", "vocab"))
    ffn = count(record, "ffn_dense", count(record, "ffn", 4 * dim))
    moe = record.get("moe") or (record if record.get("experts") else None)
    if not record.get("gated_mlp", bool(moe)) and not record.get("gated"):
        shape = gpt(layers=layers, dim=dim, heads=heads, vocab=vocab, ffn=ffn)
    else:
        kv_heads = count(record, "kv_heads", heads)
        shape = llama(layers=layers, dim=dim, ffn=ffn, heads=heads, kv_heads=kv_heads, vocab=vocab)
    shape = replace(shape, name=name, tied_embeddings=bool(record.get("tied", shape.tied_embeddings)))
    shape = _noted(shape, record)
    if moe:
        shape = with_experts(
            replace(shape, dense_first=count(moe, "dense_first_layers", 0)), experts=count(moe, "experts"),
            top_k=count(moe, "top_k"), hidden=count(moe, "expert_ffn"), shared=count(moe, "shared_ffn", 0),
        )  # fmt: skip
    return shape


def _noted(shape: ModelShape, record: Row) -> ModelShape:
    """The shape with the head widths a record gives, as fields or in the words of its note."""
    note = str(record.get("note") or "")
    latent = re.search(r"q_lora (\d+), kv_lora (\d+), qk nope (\d+) \+ rope (\d+), v (\d+)", note)
    if latent:
        q_rank, kv_rank, nope, rope, v = map(int, latent.groups())
        mla = MLAShape(q_rank=q_rank, kv_rank=kv_rank, nope_dim=nope, rope_dim=rope, v_dim=v)
        return replace(shape, mla=mla, head_dim=nope + rope)
    width = re.search(r"head_dim (\d+)", note)
    return replace(shape, head_dim=count(record, "head_dim", int(width[1]) if width else shape.head_dim))

"""Tables and lines of `turnout plan inference`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # plan is imported when a verb runs, so that --help is quick
    from turnout.plan.inference import Inference
    from turnout.plan.serving import Serving

PARTS = {
    "products_s": ("products", "dense products, element-wise work, router, output matrix"),
    "experts_s": ("experts", "products of routed experts"),
    "attention_s": ("attention", "scores; in decoding, reading keys and values"),
    "tp_s": ("tp", "sums over ranks that share a matrix or an expert"),
    "ep_s": ("ep", "exposed all-to-all of the experts"),
    "host_s": ("host", "experts fetched from host memory"),
}


def print_answer(screen: Any, found: "Inference", document: dict[str, Any]) -> list[dict[str, Any]]:
    """Prints everything about one deployment, and gives the rows of its table."""
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    serving = found.serving
    screen.print(f"  {headline(serving, layout=True)}", soft_wrap=True)
    prefill, decode = vars(found.prefill), vars(found.decode)
    rows = [{"part": PARTS[name][0], "prefill_s": prefill[name], "decode_s": decode[name]} for name in PARTS]
    cells = [
        [
            *words, show.seconds(prefill[name]), show.seconds(decode[name]),
            show.percent(decode[name] / found.tpot_s), show.bar(decode[name] / found.tpot_s),
        ]
        for name, words in PARTS.items()
    ]  # fmt: skip
    cells.append(["all", "", show.seconds(found.ttft_s), show.seconds(found.tpot_s), "", ""])
    headings = show.columns(("part", "what it is"), ("first token", "each further", "share")) | {"": "left"}
    screen.print(table("Seconds on the busiest device", headings, cells))
    for line in (*_speed_lines(found, document), *_memory_lines(found)):
        screen.print(f"  {line}", soft_wrap=True)
    return rows


def _speed_lines(found: "Inference", document: dict[str, Any]) -> list[str]:
    from turnout.cli import plan_print as show

    serving, rate = found.serving, found.decode_tokens_per_s
    read = f"{show.gb(found.decode.weight_bytes)} GB of weights and {show.gb(found.decode.cache_bytes)} of the cache"
    rates = f"decoding {rate:,.0f} tokens/s, {rate / serving.world:,.0f} a device; prefilling"
    limit = f"{show.seconds(found.limit_s)} at the data sheet's bandwidth"
    lines = [
        f"an answer of {serving.new_tokens:,} tokens takes {show.seconds(found.request_s)}",
        f"{rates} {found.prefill_tokens_per_s:,.0f}; one after the other: {found.served_tokens_per_s:,.0f} of answers",
        f"a step of decoding reads {read}: {limit}, {show.percent(found.limit_s / found.tpot_s)} of the time",
    ]
    if found.experts_touched:
        ranks = f", {show.short(found.experts_read)} on the busiest of {serving.layout.ep:,} ranks"
        lines.append(
            f"of {serving.shape.num_experts:,} experts of a layer a step touches {show.short(found.experts_touched)}"
            f"{ranks if serving.layout.ep > 1 else ''}"
        )
    if document["usd_per_million_tokens"] is not None:
        lines.append(
            f"{show.dollars(document['usd_per_million_tokens'])} a million tokens of answers, prefill included"
        )
    return lines


def _memory_lines(found: "Inference") -> list[str]:
    from turnout.cli import plan_print as show

    memory, device = found.memory, found.serving.machine.device
    parts = (
        f"{show.gib(memory.dense_bytes)} dense weights, {show.gib(memory.experts_bytes)} experts, "
        f"{show.gib(memory.cache_bytes)} keys and values, {show.gib(memory.activations_bytes)} activations, "
        f"{show.gib(memory.workspace_bytes)} workspace"
    )
    words = "fits" if found.fits else "does not fit"
    return [f"{words}: {show.gib(memory.total_bytes)} of {show.gib(device.memory_bytes)} GiB: {parts}"]


def headline(serving: "Serving", *, layout: bool) -> str:
    """What is asked, in one line."""
    from turnout.plan.layout import layout_text

    machine, world = serving.machine, serving.world
    said = f"{serving.batch:,} sequences at once; layout {layout_text(serving.layout)}" if layout else "best layouts"
    return (
        f"{serving.shape.name or serving.model} on {world:,} x {machine.device.name} ({machine.name}), prompts of "
        f"{serving.context:,} tokens, answers of {serving.new_tokens:,}, {said}"
    )


def search_table(rows: list[dict[str, Any]], goal: str) -> Any:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table

    headings = show.columns(("layout",), ("sequences", "first token", "each further", "tokens/s a device", "GiB"))
    cells = [
        [
            row["layout"], f"{row['batch']:,}", show.seconds(row["ttft_s"]), show.seconds(row["tpot_s"]),
            show.short(row["decode_tokens_per_s_per_device"]), f"{row['memory_gib']:,.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    built = table(f"Best by {goal}", headings, cells)
    # a layout is there to be copied: never cut
    built.columns[0].overflow = "fold"
    return built


def print_published(screen: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from turnout.cli import plan_print as show
    from turnout.cli.console import table
    from turnout.plan.inference_cases import answers

    rows = [answer.to_json() for answer in answers()]
    words = {True: "holds", False: "does not hold"}
    signs = {"equal": "", "below": "< ", "above": "> "}
    headings = show.columns(("case", "of"), ("published", "planner", "error"))
    cells = [
        [
            row["id"], row["quantity"], f"{signs[row['relation']]}{show.short(row['value'])} {row['unit']}",
            show.short(row["predicted"]),
            show.percent(row["error"], signed=True) if row["holds"] is None else words[row["holds"]],
        ]
        for row in rows
    ]  # fmt: skip
    errors = [abs(row["error"]) for row in rows if row["error"] is not None and row["measured"]]
    mape = sum(errors) / len(errors)
    screen.print(table("Published figures of inference; none was fitted", headings, cells))
    for row in rows:
        assumed = f"; assumed: {row['assumed']}" if row["assumed"] else ""
        screen.print(f"  {row['id']}: {row['source']}{assumed}", style="dim", soft_wrap=True)
    screen.print(
        f"  mean error of {len(errors)} measured figures {show.percent(mape)}, the largest {show.percent(max(errors))}"
    )
    return {"rows": rows, "mape": mape, "n": len(errors)}, rows

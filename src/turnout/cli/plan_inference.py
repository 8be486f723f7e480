"""`turnout plan inference`: the first token, each further one, and how many a second."""

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from turnout.cli import options, plan_options

if TYPE_CHECKING:
    from turnout.plan.inference import Inference
    from turnout.plan.serving import Serving

EXAMPLE = (
    'Example: turnout plan inference deepseek-v3 --cluster h800 --nodes 16 --batch 8192 --context 4096 '
    '--layout "ep=128,precision=fp8,dispatch_precision=fp8,overlap=2" --one-sided --json'
)  # fmt: skip
ServedModel = Annotated[
    str, typer.Argument(help="A model by name (`turnout plan models`), or the path of a Hugging Face config.json.")
]
Sequences = Annotated[
    int,
    typer.Option("--batch", help="Sequences decoded at once, over all devices; 0: 1, or for throughput the best."),
]
Context = Annotated[int, typer.Option("--context", help="Tokens of a prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Tokens of an answer.")]
PrefillBatch = Annotated[int, typer.Option("--prefill-batch", help="Prompts that a data-parallel rank takes at once.")]
ServedLayout = Annotated[
    str,
    typer.Option(
        "--layout",
        help="tp=8,ep=32,etp=2,precision=fp8,alltoall=hierarchical,overlap=2,...; attention is copied over the rest. "
        "What is left out is searched if there is a --goal or a --limit-ms, or no --layout.",
        metavar="A=V,...",
    ),
]
Goal = Annotated[str, typer.Option("--goal", help="Search: latency of a token, or throughput.")]
LimitMs = Annotated[float, typer.Option("--limit-ms", help="Search: the longest time of a token; 0: any.")]
Top = Annotated[int, typer.Option("--top", help="Search: layouts to show.")]
KvPrecision = Annotated[str, typer.Option("--kv-precision", help="Of cached keys and values, such as fp8.")]
Redundant = Annotated[int, typer.Option("--redundant-experts", help="Copies of busy experts that a layer has beside.")]
OneSided = Annotated[
    bool, typer.Option("--one-sided", help="All sends of an exchange are under way at once (DeepEP, low latency).")
]
Cached = Annotated[
    int,
    typer.Option("--cached-experts", help="Experts of a layer a device keeps, the rest in host memory; 0: all."),
]
HitRate = Annotated[
    float, typer.Option("--hit-rate", help="Share of touched experts found on the device; 0: as many as are kept.")
]
HostGb = Annotated[
    float, typer.Option("--host-gb-per-s", help="From host to one device, GB/s; 0: the data sheet's, an upper bound.")
]
Published = Annotated[bool, typer.Option("--published", help="The planner against published figures instead.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLE)(inference)


def inference(
    model: ServedModel = "",
    cluster: plan_options.Cluster = "dgx-h100",
    nodes: plan_options.Nodes = 0,
    devices: plan_options.Devices = 0,
    batch: Sequences = 0,
    context: Context = 2048,
    new_tokens: NewTokens = 256,
    prefill_batch: PrefillBatch = 1,
    layout: ServedLayout = "",
    goal: Goal = "",
    limit_ms: LimitMs = 0.0,
    top: Top = 10,
    kv_precision: KvPrecision = "bf16",
    skew: plan_options.Skew = 1.0,
    redundant_experts: Redundant = 0,
    one_sided: OneSided = False,
    cached_experts: Cached = 0,
    hit_rate: HitRate = 0.0,
    host_gb_per_s: HostGb = 0.0,
    usd_per_device_hour: plan_options.Price = 0.0,
    published: Published = False,
    csv: plan_options.Csv = None,
    as_json: options.Json = False,
) -> None:
    """Time to the first token, time of each further one, throughput; or the best layout (exit code 1: none)."""
    from turnout.cli import plan_inference_print as printed
    from turnout.cli import plan_print
    from turnout.cli.console import print_json
    from turnout.clusters import load_cluster
    from turnout.errors import ConfigError
    from turnout.plan.bill import priced
    from turnout.plan.inference import infer
    from turnout.plan.inference_experts import Offload
    from turnout.plan.layout import layout_of
    from turnout.plan.serving import Serving

    screen = plan_print.wide_console(as_json=as_json)
    if published:
        document, rows = printed.print_published(screen)
    elif not model:
        raise ConfigError("give a MODEL (`turnout plan models` lists them), or --published")
    else:
        machine = priced(load_cluster(cluster), usd_per_device_hour)
        serving = Serving(
            model=model, cluster=machine, nodes=nodes, devices=devices,
            batch=batch or 1, context=context, new_tokens=new_tokens, prefill_batch=prefill_batch,
            strategy=layout_of(layout, machine.device), kv_precision=cast(Any, kv_precision), skew=skew,
            redundant_experts=redundant_experts, one_sided=one_sided,
            offload=Offload(cached=cached_experts, hit_rate=hit_rate, host_bytes_per_s=host_gb_per_s * 1e9),
        )  # fmt: skip
        if goal or limit_ms or not layout:
            batches = _batches(serving) if goal == "throughput" and not batch else ()
            searched = {"goal": goal or "latency", "limit_s": limit_ms / 1e3, "batches": batches, "top": top}
            document, rows = _search(screen, serving, layout, searched)
        else:
            found = infer(serving)
            document = found.to_json() | _price(found) | _asked(serving)
            rows = printed.print_answer(screen, found, document)
    plan_print.write_csv(csv, rows, screen)
    if as_json:
        print_json(document)
    if not rows:
        raise typer.Exit(1)


def _price(found: "Inference") -> dict[str, float | None]:
    """Dollars for a million tokens of answers, where the rent is known."""
    hour = found.serving.machine.usd_per_device_hour * found.serving.world
    return {"usd_per_million_tokens": hour / 3600 / found.served_tokens_per_s * 1e6 if hour else None}


def _asked(serving: "Serving") -> dict[str, Any]:
    from turnout.plan.layout import layout_text

    names = ("batch", "context", "new_tokens", "prefill_batch")
    return {name: getattr(serving, name) for name in names} | {
        "model": serving.shape.name or str(serving.model),
        "cluster": serving.machine.name,
        "devices": serving.world,
        "layout": layout_text(serving.layout),
    }


def _batches(serving: "Serving") -> tuple[int, ...]:
    """Powers of two up to one sequence a device, then as many more on each."""
    from turnout.plan.inference_search import MOST_SEQUENCES

    few = {2**i for i in range(serving.world.bit_length()) if 2**i < serving.world}
    return tuple(sorted(few | {serving.world * 2**i for i in range(MOST_SEQUENCES.bit_length())}))


def _search(
    screen: Any, serving: "Serving", layout: str, searched: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from turnout.cli import plan_inference_print as printed
    from turnout.cli import plan_print as show
    from turnout.plan.inference_search import search_inference
    from turnout.plan.layout import said_of

    said = {name: getattr(serving.strategy, name) for name in said_of(layout)}
    result = search_inference(serving, said=said, **searched)
    document = result.to_json()
    screen.print(f"  {printed.headline(serving, layout=False)}", soft_wrap=True)
    memory, limit_s = show.gib(serving.machine.device.memory_bytes), searched["limit_s"]
    if result.best:
        screen.print(printed.search_table(document["best"], searched["goal"]))
    elif result.fitting:
        screen.print(f"  of {result.fitting:,} that fit none takes at most {show.seconds(limit_s)} a token")
    else:
        screen.print(f"  none fits {memory} GiB; the least needs {document['least_memory_gib']:,.1f} GiB")
    screen.print(
        f"  {result.fitting:,} of {result.considered:,} layouts and batches fit {memory} GiB; {result.seconds:.2f} s"
    )
    asked = {"model": serving.shape.name, "cluster": serving.machine.name, "devices": serving.world}
    return document | asked, document["best"]

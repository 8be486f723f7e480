"""Which laws of `turnout verify` each layer keeps, ours and others': writes docs/verify.md.

Usage: python -m benchmarks.verify_layers
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from turnout.contracts import RouterConfig
from turnout.errors import ConfigError
from turnout.verify import CHECKS, Result, Subject, verify
from turnout.verify.run import in_order
from turnout.verify.targets import layer_presets, peer_targets, subject

PAGE = Path(__file__).parents[1] / "docs" / "verify.md"
OURS = (*layer_presets(), "tiny")
# their eager experts alone: grouped_mm has no float64, in which most laws are tried
THEIRS = tuple(f"transformers:{block}:eager" for block in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"))
BALANCE = 'model.moe.losses=[{name="load_balance"}]'
# with one group, or alone in a decoder, a router would not be what its name says, or not be built
ROUTER_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": ("model.moe.router.groups=2", "model.moe.router.top_groups=1"),
    "device_limited": ("model.moe.router.groups=2", "model.moe.router.top_groups=1"),
    "expert_choice": ("model.moe.router.in_decoder=allow",),
}
INTRO = """# What layers keep

Written by `python -m benchmarks.verify_layers`, with the layers of others from `pip install 'turnout[bench,peers]'
torchtitan triton`; one layer alone: `turnout verify TARGET`. {versions}, CPU.

Each row is a law of Mixture-of-Experts layers, tried from small cases to large in float64 unless it says otherwise.
`-`: the layer has no such thing (a mask, an auxiliary loss) or does not show it. Sizes are small; speed, other devices
and many processes are not looked at. How to read a **no**, in our columns and in those of others:

- It need not be a fault. A paper may give a law up on purpose: under a capacity, or where experts choose, tokens depend
  on each other (G9, O6, O7); chance, or experts that choose, are for training alone (R5).
- R3: `torch.topk`, which most use, promises no order of equal scores. The law matters to runs that are to be the same
  on two machines.
- O3, where an error is given below, is a matter of where bfloat16 is rounded: between the products, and where the
  answers of routed and shared experts are added.
- G3 is tried with one expert a token only where a layer takes no more. A router that makes the weights of a token's
  choices sum to 1 weighs one choice 1, whatever its score: all it gets from the main loss is rounding. Ours refuse to
  be built so; four of transformers' five blocks (not OLMoE's, which keeps the softmax over all experts) are built.
- transformers' routers and DeepSpeed's gates compute in float32 by design: in those columns an error of 1e-6
  is allowed where ours are allowed less, and 1e-2 for finite differences. What is to be exact (an allowed error of 0)
  must be so there too: DeepSpeed's P1 and P2 are off by the last bits of float32.
- The layers of others are called as our adapters call them (`src/turnout/verify/adapters/`), with the settings named
  below. Shapes they do not support, such as a batch of no tokens (G6, O4), count all the same.
"""
BY_DESIGN = {
    "st_moe_pytorch:moe": "its dispatch is by default a straight-through estimator, whose gradient is on purpose not "
    "that of its output (G1, G2)",
    "torchtitan:moe": "its experts work in bfloat16 whatever they are given (G2, G9); the counter its bias follows "
    "grows with every forward pass in training (S2)",
}
ROUTER_DESIGNS: Mapping[str, str] = {
    "base": "the even assignment is for training alone (R5)",
    "expert_choice": "experts choose among the tokens of a batch (G9, O7), equally many each, which makes a balance "
    "loss a constant (A3)",
    "forced": "tokens are dealt by their place in the batch (G9, O6, O7)",
    "gshard": "the second expert is sent by chance in training (R5)",
    "locmoe_plus": "experts decline tokens in training alone (R5)",
    "noisy_topk": "noise is for training alone (R5), and so are the weights that scale it (G3)",
    "quantile": "a batch's own prices are for training, their average is for evaluation (R5)",
    "sinkhorn": "the even plan is for training alone (R5)",
}
SIGN = {"pass": "yes", "fail": "**no**", "not applicable": "-"}


def main() -> None:
    missing = {target: why for target in peer_targets() if (why := absent(target))}
    peers = tuple(target for target in peer_targets() if target not in missing)
    routers, unfit = our_routers()
    subjects = {target: subject(target) for target in (*OURS, *THEIRS, *peers)} | routers
    results = {target: {r.id: r for r in verify(tried)} for target, tried in subjects.items()}
    versions = {name: version for tried in subjects.values() for name, version in tried.versions.items()}
    lines = [
        *INTRO.format(
            versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        ).splitlines(),
        "",
        *_table(results, OURS, "Ours"),
        *_table(results, tuple(routers), "Our routers"),
        *_router_notes(routers, unfit),
        *_table(results, THEIRS, "Hugging Face transformers"),
        *(_table(results, peers, "Other libraries") if peers else []),
        *_notes(peers, missing),
        "## Where a law is not kept",
        "",
        "The smallest case found, and how far off it was (the error allowed in brackets).",
        "",
    ]
    for target, found in results.items():
        lines += [f"- `{target}` {_failure(r)}" for r in found.values() if r.outcome == "fail"]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for target, found in results.items():
        print(target, dict(Counter(r.outcome for r in found.values())))


def our_routers() -> tuple[dict[str, Subject], dict[str, str]]:
    """`tiny` with each router of the table, and a balance loss where it takes one; and why some cannot be built."""
    fit: dict[str, Subject] = {}
    unfit: dict[str, str] = {}
    for name in RouterConfig.TABLE.names():
        settings = (f"model.moe.router.name={name}", *ROUTER_SETTINGS.get(name, ()))
        try:
            subject("tiny", settings)
        except ConfigError as error:
            unfit[name] = str(error)
            continue
        try:
            fit[f"tiny {name}"] = subject("tiny", (*settings, BALANCE))
        except ConfigError:
            fit[f"tiny {name}"] = subject("tiny", settings)
    return fit, unfit


def absent(target: str) -> str:
    """Why a peer cannot be tried here, or nothing."""
    try:
        subject(target)
    except ConfigError as error:
        return str(error)
    return ""


def _notes(peers: tuple[str, ...], missing: dict[str, str]) -> list[str]:
    """The settings each peer was tried with, and who was left out."""
    designs = {target: f": {words}" for target, words in BY_DESIGN.items()}
    tried = [f"- `{subject(target).name}`{designs.get(target, '')}" for target in peers]
    left_out = [f"- `{target}` not tried: {why}" for target, why in missing.items()]
    return [*tried, *left_out, ""]


def _router_notes(routers: dict[str, Subject], unfit: dict[str, str]) -> list[str]:
    """How each was built, what it gives up by design, and which do not fit the recipe."""
    names = [label.removeprefix("tiny ") for label in routers]
    unbalanced = [f"`{name}`" for name in names if BALANCE not in routers[f"tiny {name}"].name]
    return [
        "Each is the recipe `tiny` with that router in place of its own and, where it takes one, a balance loss:",
        f"`turnout verify tiny --set model.moe.router.name=NAME --set '{BALANCE}'`.",
        "",
        *(f"- `{name}` is set by `{' '.join(settings)}`." for name, settings in ROUTER_SETTINGS.items()),
        *([f"- Without a balance loss, which they refuse: {', '.join(unbalanced)}."] if unbalanced else []),
        *(f"- `{name}`: {words}." for name, words in ROUTER_DESIGNS.items() if name in names),
        *(f"- `{name}` does not fit the recipe: {why}" for name, why in unfit.items()),
        "",
    ]


def _table(results: dict[str, dict[str, Result]], targets: tuple[str, ...], title: str) -> list[str]:
    names = [target.removeprefix("transformers:").removeprefix("tiny ").replace(":", " ") for target in targets]
    rows = [
        f"| {id} | {CHECKS[id].title} | {' | '.join(SIGN[results[target][id].outcome] for target in targets)} |"
        for id in in_order(CHECKS.names())
    ]
    kept = [Counter(r.outcome for r in results[target].values()) for target in targets]
    summary = [f"{c['pass']} of {c['pass'] + c['fail']}" for c in kept]
    return [
        f"## {title}",
        "",
        f"| | law | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
        *rows,
        f"| | kept of those that apply | {' | '.join(summary)} |",
        "",
    ]


def _failure(result: Result) -> str:
    off = "" if result.error is None else f" off by {result.error:.1e} ({result.tolerance:.0e})"
    return f"{result.id} {result.title}:{off} {result.case}"


if __name__ == "__main__":
    main()

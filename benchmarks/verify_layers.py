"""Which laws of `turnout verify` each layer keeps, ours and others': writes docs/verify.md.

Usage: python -m benchmarks.verify_layers
"""

from collections import Counter
from pathlib import Path

from turnout.errors import ConfigError
from turnout.verify import CHECKS, Result, verify
from turnout.verify.run import in_order
from turnout.verify.targets import layer_presets, peer_targets, subject

PAGE = Path(__file__).parents[1] / "docs" / "verify.md"
OURS = (*layer_presets(), "tiny")
# their eager experts alone: grouped_mm has no float64, in which most laws are tried
THEIRS = tuple(f"transformers:{block}:eager" for block in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"))
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
- O3, where an error is given below, is a matter of where bfloat16 is rounded between the products.
- Sizes with one expert a token are among those tried: a router that softmaxes the one chosen score weighs it 1,
  whatever the score, and learns nothing from the main loss (G3). Models of more experts a token do not meet that.
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
SIGN = {"pass": "yes", "fail": "**no**", "not applicable": "-"}


def main() -> None:
    missing = {target: why for target in peer_targets() if (why := absent(target))}
    peers = tuple(target for target in peer_targets() if target not in missing)
    results = {target: {r.id: r for r in verify(subject(target))} for target in (*OURS, *THEIRS, *peers)}
    versions = {name: version for target in results for name, version in subject(target).versions.items()}
    lines = [
        *INTRO.format(
            versions=", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        ).splitlines(),
        "",
        *_table(results, OURS, "Ours"),
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


def _table(results: dict[str, dict[str, Result]], targets: tuple[str, ...], title: str) -> list[str]:
    names = [target.removeprefix("transformers:").replace(":", " ") for target in targets]
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

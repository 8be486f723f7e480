"""`turnout generate`: continue a prompt."""

import sys
import time
from typing import Annotated

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, write_pieces


def add_to(app: typer.Typer) -> None:
    app.command(epilog='Example: turnout generate runs/tiny-1 --prompt "def read_file(path):" --temperature 0.9')(
        generate
    )


def generate(
    run: options.RunFolder,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue; empty: start a document.")] = "",
    max_new_tokens: options.MaxNew = 200,
    temperature: options.Temperature = 0.8,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 0.95,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    quantize: options.Quantize = "",
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt with a trained model."""
    from turnout.cli.process import own_process
    from turnout.infer.generate import GenerateConfig
    from turnout.infer.generate import generate as continue_text
    from turnout.train.trained import load_trained

    config = GenerateConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    own_process(threads)
    trained = load_trained(run, quantize=quantize)
    screen = console(as_json=as_json)
    for note in trained.notes:
        screen.print(f"note: {note}")
    out = sys.stderr if as_json else sys.stdout
    started = time.perf_counter()
    generation = continue_text(trained.model, trained.tokenizer, prompt, config)
    out.write(prompt)
    text = write_pieces(out, generation)
    if as_json:
        seconds, tokens = time.perf_counter() - started, generation.num_tokens
        print_json({"text": text, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)})

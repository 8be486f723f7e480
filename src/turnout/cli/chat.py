"""`turnout chat`: a prompt loop with a trained model."""

import sys

import typer
from rich.console import Console
from rich.text import Text

from turnout.cli import options
from turnout.cli.console import console, print_error, print_json, write_pieces
from turnout.errors import RequestError


def add_to(app: typer.Typer) -> None:
    app.command(epilog="Example: turnout chat runs/tiny-1 --temperature 0.9")(chat)


def chat(
    run: options.RunFolder,
    max_new_tokens: options.MaxNew = 200,
    temperature: options.Temperature = 0.8,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 0.95,
    seed: options.Seed = None,
    stop: options.Stop = None,
    quantize: options.Quantize = "",
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Talk to a trained model. A base model continues text: type the beginning of what you want to read."""
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
    screen.print(f"{trained.recipe.name} at step {trained.step}; an empty line or Ctrl-D ends", style="dim")
    for note in trained.notes:
        screen.print(f"note: {note}")
    turns = []
    while prompt := _ask(screen):
        try:
            generation = continue_text(trained.model, trained.tokenizer, prompt, config)
        except RequestError as error:
            # one prompt too long is no reason to lose the conversation
            print_error(str(error))
            turns.append({"prompt": prompt, "text": "", "tokens": 0, "error": str(error)})
            continue
        text = write_pieces(sys.stderr if as_json else sys.stdout, generation)
        turns.append({"prompt": prompt, "text": text, "tokens": generation.num_tokens})
    if as_json:
        print_json({"run": str(run), "turns": turns})


def _ask(screen: Console) -> str:
    try:
        return screen.input(Text("> ", style="bold cyan")).replace("\\n", "\n")
    except EOFError:
        return ""

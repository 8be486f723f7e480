"""`turnout data`: which texts there are, and getting them."""

from typing import Annotated

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json, table

data = typer.Typer(
    help="Corpora: licence, size, how each is obtained.", no_args_is_help=True, epilog="Example: turnout data list"
)


def add_to(app: typer.Typer) -> None:
    app.add_typer(data, name="data")


@data.command("list", epilog="Example: turnout data list")
def list_corpora(as_json: options.Json = False) -> None:
    """Every corpus by name."""
    from turnout.data.corpora import CORPORA, corpus_names

    rows = []
    for name in corpus_names():
        corpus = CORPORA[name]
        problem = corpus().problem()
        rows.append(
            {
                "name": name,
                "title": corpus.title,
                "licence": corpus.licence,
                "bytes": corpus.size_bytes,
                "obtained": corpus.obtained,
                "problem": problem,
            }
        )
    columns = {"name": "left", "what": "left", "size": "right", "licence": "left", "how it is obtained": "left"}
    cells = [
        [r["name"], r["title"], f"{r['bytes'] / 1e6:.1f} MB", r["licence"], r["problem"] or r["obtained"]] for r in rows
    ]
    console(as_json=as_json).print(table("Corpora", columns, cells))
    if as_json:
        print_json({"corpora": rows})


@data.command("fetch", epilog="Example: turnout data fetch sotu")
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a corpus, or a path.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Get a corpus into the cache and count it."""
    from turnout.cache import default_cache
    from turnout.data.corpora import open_corpus
    from turnout.data.survey import survey

    card = survey(open_corpus(name), default_cache())
    screen = console(as_json=as_json)
    screen.print(f"{name}: {card.documents} documents, {card.text_bytes / 1e6:.1f} MB, {card.licence}")
    if as_json:
        print_json(
            {
                "name": name,
                "path": card.path,
                "bytes": card.text_bytes,
                "documents": card.documents,
                "licence": card.licence,
            }
        )

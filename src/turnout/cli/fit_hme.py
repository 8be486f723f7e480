"""`turnout fit-hme`: a hierarchical mixture of experts for the rows of a CSV file."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from turnout.cli import options
from turnout.cli.console import console, print_json
from turnout.errors import ConfigError, DataError

FEW_VALUES = 5  # of a target of numbers, up to which it may be meant as classes


def add_to(app: typer.Typer) -> None:
    app.command("fit-hme", epilog="Example: turnout fit-hme data.csv --target y --depth 4 --report out.html")(fit_hme)


def fit_hme(
    data: Annotated[Path, typer.Argument(help="A CSV file; its first line names the columns.", show_default=False)],
    target: Annotated[str, typer.Option("--target", help="Column to predict.", show_default=False)],
    depth: Annotated[int, typer.Option(help="Levels of gates; branching ** depth experts.", min=0, max=12)] = 2,
    branching: Annotated[int, typer.Option(help="Branches of a gate.", min=2)] = 2,
    task: Annotated[str, typer.Option(help="regression, classification or counts; auto: by the target.")] = "auto",
    solver: Annotated[str, typer.Option(help="em, least_squares (algorithm 2), gradient or online.")] = "em",
    max_iter: Annotated[
        int | None, typer.Option("--max-iter", help="Most iterations; default 100, 3 passes on-line.", min=1)
    ] = None,
    noise_start: Annotated[
        float, typer.Option("--noise-start", help="Noise at first, in variances of the target; regression.")
    ] = 1.0,
    hold_noise: Annotated[
        int,
        typer.Option("--hold-noise", help="First iterations that keep that noise; 25 at 0.3 help many experts.", min=0),
    ] = 0,
    restarts: Annotated[int, typer.Option(help="Random starts; the likeliest is kept.", min=1)] = 1,
    max_experts: Annotated[
        int, typer.Option("--max-experts", help="Grow to at most so many; 0: do not grow.", min=0)
    ] = 0,
    missing: Annotated[str, typer.Option(help="Missing inputs: refuse, or mean of their column.")] = "refuse",
    test_share: Annotated[float, typer.Option("--test-share", help="Rows kept aside to measure the error.")] = 0.25,
    seed: Annotated[int, typer.Option(help="The same seed gives the same fit.", min=0)] = 0,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page of the fit.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fit a tree of gates and experts to a table, by EM."""
    import numpy as np

    from turnout.hme import HMEClassifier, HMERegressor
    from turnout.hme.table import read_table

    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"--report {report}: there is no folder {report.parent}")
    table = read_table(data, target)
    if missing == "refuse" and table.first_missing is not None:
        line, column = table.first_missing
        place = f"{data} line {line}: column {column!r}"
        raise DataError(f"{place} is missing; use --missing mean, or leave such lines out")
    kind = _task(task, table, data)
    settings: dict[str, Any] = {
        "depth": depth, "branching": branching, "solver": solver, "max_iter": max_iter, "n_init": restarts,
        "max_experts": max_experts or None, "missing": missing, "random_state": seed,
    }  # fmt: skip
    if kind == "classification":
        if noise_start != 1 or hold_noise:
            raise ConfigError("--noise-start and --hold-noise are of regression: classes have no noise")
        estimator: Any = HMEClassifier(**settings)
    else:
        family = "poisson" if kind == "counts" else "gaussian"
        estimator = HMERegressor(**settings, family=family, noise_start=noise_start, hold_noise=hold_noise)
    fitted = _fit(estimator, table, kind, test_share, seed)
    screen = console(as_json=as_json)
    for note in table.notes:
        screen.print(note)
    if kind == "regression" and task == "auto" and len(np.unique(table.y_N)) <= FEW_VALUES:
        screen.print(
            f"{target}: few different numbers, fitted as amounts; if they are kinds, use --task classification"
        )
    screen.print(_text(estimator, table, kind), soft_wrap=True)
    screen.print(_sentence(fitted, kind), soft_wrap=True)
    if report is not None:
        _write_report(report, data, table, estimator, fitted, kind)
        screen.print(f"wrote {report} ({report.stat().st_size / 1024:.0f} KiB)")
    if as_json:
        print_json({name: value for name, value in fitted.items() if not name.startswith("_")})


def _task(task: str, table: Any, data: Path) -> str:
    from turnout.hme.table import MOST_VALUES

    if task not in ("auto", "regression", "classification", "counts"):
        raise ConfigError(f"--task {task!r} must be one of: auto, regression, classification, counts")
    if task in ("regression", "counts") and not table.is_numeric:
        raise DataError(f"--task {task} needs numbers in column {table.target!r}; use --task classification")
    if task != "auto":
        return task
    if table.first_word is None:
        return "regression"
    # a number that was mistyped, or names of rows, would make nearly every row a class
    (line, word), classes = table.first_word, len(set(table.y_text))
    if classes > MOST_VALUES:
        raise DataError(
            f"{data} line {line}: the target {table.target!r} has {word!r}, which is no number, and {classes} "
            "different values; for so many classes, say --task classification"
        )
    return "classification"


def _fit(estimator: Any, table: Any, kind: str, test_share: float, seed: int) -> dict[str, Any]:
    """Fits to a random part of the rows and measures on the others; with no others, on the rows of the fit."""
    import numpy as np

    if not 0 <= test_share < 1:
        raise ConfigError(f"--test-share {test_share} must be at least 0 and below 1")
    y = np.array(table.y_text) if kind == "classification" else table.y_N
    order_N = np.random.default_rng(seed).permutation(len(y))
    num_test = round(test_share * len(y))
    test_N, train_N = order_N[:num_test], order_N[num_test:]
    started = time.perf_counter()
    try:
        estimator.fit(table.x_ND[train_N], y[train_N])
    except ValueError as problem:
        aside = f" ({num_test} of {len(y)} rows are kept aside; --test-share)" if "rows" in str(problem) else ""
        raise DataError(f"{problem}{aside if num_test else ''}") from problem
    seconds = time.perf_counter() - started
    test_N = test_N if num_test else train_N
    guess = estimator.predict(table.x_ND[test_N])
    if kind == "classification":
        error: float | None = float(np.mean(guess != y[test_N]))
    else:
        spread = float(np.var(y[test_N]))
        error = float(np.mean((guess - y[test_N]) ** 2)) / spread if spread > 0 else None
    return {
        "log_likelihood": float(estimator.loglik_), "relative_error": error,
        "iterations": int(estimator.n_iter_), "seconds": round(seconds, 3),
        "experts": estimator.mixture_.tree.num_leaves,
        "train_rows": len(train_N), "test_rows": num_test, "task": kind,
        "_truth": y[test_N], "_guess": guess, "_x": table.x_ND[train_N],
    }  # fmt: skip


def _sentence(fitted: dict[str, Any], kind: str) -> str:
    measured = "share of wrong classes" if kind == "classification" else "error over variance"
    where = f"{fitted['test_rows']} rows kept aside" if fitted["test_rows"] else "the rows of the fit themselves"
    error = _share(fitted["relative_error"])
    return (
        f"{fitted['experts']} experts after {fitted['iterations']} iterations in {fitted['seconds']:.2f} s: "
        f"{measured} {error} on {where}"
    )


def _write_report(path: Path, data: Path, table: Any, estimator: Any, fitted: dict[str, Any], kind: str) -> None:
    from turnout.hme.page import PageData, render

    is_class = kind == "classification"
    page = PageData(
        title=f"{table.target} in {data.name}",
        sentence=_sentence(fitted, kind),
        tiles=(
            ("experts", str(fitted["experts"])),
            ("wrong" if is_class else "relative error", _share(fitted["relative_error"])),
            ("log-likelihood a row", f"{fitted['log_likelihood'] / fitted['train_rows']:.4f}"),
            ("iterations", str(fitted["iterations"])),
        ),
        loglik_path=estimator.loglik_path_ / fitted["train_rows"],
        names=table.names,
        text=_text(estimator, table, kind),
        truth_N=fitted["_truth"],
        guess_N=fitted["_guess"],
        is_class=is_class,
        share_L=estimator.apply(fitted["_x"]).mean(axis=0),
        where=f"{len(fitted['_truth'])} rows {'kept aside' if fitted['test_rows'] else 'of the fit itself'}.",
    )  # fmt: skip
    path.write_text(render(page, estimator), encoding="utf-8")


def _text(estimator: Any, table: Any, kind: str) -> str:
    return estimator.export_text(list(table.names), None if kind == "classification" else [table.target])


def _share(error: float | None) -> str:
    return "n/a" if error is None else f"{error:.4f}"

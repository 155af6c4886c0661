"""What `eval --tasks` does: standard benchmarks of any models, in EleutherAI's harness."""

import logging

from elmwood.cli.screen import bars, emit, expand, table, talk
from elmwood.errors import BadInput
from elmwood.evaluate import harness
from elmwood.store import Store
from elmwood.study.ancestry import as_model, seed_of, with_mixing


def benchmarks(*, models, mixing, tasks, limit, folder, download, store, as_json) -> None:
    if not download:
        harness.forbid_downloads()
    from elmwood.ensemble.generate import generate  # torch, and the libraries that may not fetch
    from elmwood.ensemble.mixture import open_model
    from elmwood.lm.files import tokenizer

    home, results = Store(store), []
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise BadInput("--tasks is empty: name tasks of the harness, as in --tasks arc_easy,lambada_openai")
    wanted = [as_model(home.load(name), home) for name in expand(home, models)]
    wanted = [with_mixing(record, mixing, home) for record in wanted] if mixing else wanted
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    opened = harness.open_tasks(names, folder, limit)
    with bars() as progress:
        for name, record in zip(expand(home, models), wanted, strict=True):
            reader = harness.Reader(
                open_model(record, home), tokenizer(seed_of(record, home), home), harness.Answers(home, record.digest), generate,
                lambda what, *event, name=name: progress(f"{name}: {what}", *event),
            )  # fmt: skip
            results.append({"name": name, "model": record.digest, **harness.benchmark(opened, reader)})
    if as_json:
        emit(results)
    else:
        _print(results)


def _print(results: list[dict]) -> None:
    """A line for each task and metric, a column for each model."""
    first = results[0]
    rows, styles = [], []
    for kind in ("tasks", "groups"):
        for name, value in first[kind].items():
            for metric in value["metrics"] if kind == "tasks" else value:
                cells = [name, value["version"], f"{value['items']}/{value['of']}"] if kind == "tasks" else [name, "", "group"]
                for result in results:
                    of = result[kind][name]["metrics"] if kind == "tasks" else result[kind][name]
                    cells += [_number(of[metric]["value"]), _number(of[metric]["standard_error"])]
                rows.append([*cells[:3], metric, *cells[3:]])
                styles.append("" if kind == "tasks" else "cyan")
    head = ["task", "version", "items", "metric", *(cell for result in results for cell in (result["name"], "±"))]
    table(f"lm-evaluation-harness {first['lm_eval']}; items chosen by hash", head, rows, styles)
    for result in results:
        talk.print(f"{result['name']}: model {result['model'][:12]}, {result['asked']} requests asked, the others known", style="dim")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"

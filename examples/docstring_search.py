"""Search Python code by what it does, with a model trained here in three ways.

    python examples/docstring_search.py train
    python examples/docstring_search.py search "parse an ISO date"

`train` mines pairs (a docstring's first sentence, the function's source) from the standard
library, NumPy and PyTorch. It trains the model three times, with in-batch negatives only, with a
negative cache and the paper's estimator, and with the cache and NegativeCacheLoss's defaults, and
compares them on held-out queries. `search` answers any query with the model that was trained last.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from docstring_model import (
    MakeLoss,
    Result,
    SearchModel,
    Settings,
    cache_loss,
    embed_all_items,
    in_batch_loss,
)
from docstring_model import train as train_model
from docstring_pairs import Data, Pair, as_data, mine_pairs, query_tokens, words
from matplotlib.figure import Figure

OUT = Path(__file__).resolve().parents[1] / "runs" / "docstring_search"
IN_BATCH, PAPER, DEFAULTS = "in-batch negatives", "cache, as in the paper", "cache, defaults"
METHODS: dict[str, MakeLoss] = {
    IN_BATCH: in_batch_loss,
    PAPER: partial(cache_loss, estimator="paper", in_batch_negatives=False, max_staleness=None),
    DEFAULTS: cache_loss,
}
SAMPLES = (
    "parse an ISO date",
    "download a file from a URL",
    "clip the norm of the gradients",
)


def train(settings: Settings, max_pairs: int | None, out: Path) -> None:
    """Mine, train with every method, report, save, and answer sample queries."""
    start = time.perf_counter()
    pairs = mine_pairs(max_pairs)
    data = as_data(pairs)
    print(
        f"{len(pairs):,} pairs: {len(data.train):,} to train on, {len(data.held_out):,} held out. "
        f"{settings.steps:,} steps of {settings.batch_size}."
    )
    results = {method: _in_own_process(method, settings, data) for method in METHODS}
    print(table(results, settings, len(pairs)))
    out.mkdir(parents=True, exist_ok=True)
    save_results(results, settings, data, out / "results.json")
    plot(results, settings, len(pairs), out / "curves.png")
    save_model(results[DEFAULTS], pairs, data, out)
    print(f"Saved model.pt, items.json, results.json and curves.png in {out}")
    for query in SAMPLES:
        search(query, out)
    print(f"\nAll of it took {time.perf_counter() - start:.0f} s.")


def _in_own_process(method: str, settings: Settings, data: Data) -> Result:
    """Train in a fresh process, so that its peak memory is its own."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(train_model, method, METHODS[method], settings, data).result()


def table(results: dict[str, Result], settings: Settings, items: int) -> str:
    """Return the comparison as text."""
    row = "{:<36}{:>8}{:>11}{:>9}{:>9}".format
    lines = [
        row(f"held-out queries among {items:,} items", "MRR", "recall@10", "seconds", "peak MB")
    ]
    for method, result in results.items():
        *_, mrr, recall = result.curve[-1]
        figures = f"{mrr:.3f}", f"{recall:.3f}", f"{result.seconds:.1f}", f"{result.memory_mb:.0f}"
        lines.append(row(method, *figures))
    cache_mb = results[DEFAULTS].cache_mb
    notes = f"""
seconds: in training steps, without evaluation.
peak MB: resident memory of each training's own process, with Python, PyTorch and the data; the
cache of {settings.cache_size:,} slots takes {cache_mb:.1f} MB of it."""
    return "\n".join(["", *lines, notes])


def save_results(results: dict[str, Result], settings: Settings, data: Data, path: Path) -> None:
    """Save the settings, the curves and the final figures as JSON."""
    report = {
        "settings": settings._asdict(),
        "pairs": {"train": len(data.train), "held_out": len(data.held_out)},
        "methods": {
            method: {
                "mrr": result.curve[-1][2],
                "recall_at_10": result.curve[-1][3],
                "seconds": result.seconds,
                "peak_memory_mb": result.memory_mb,
                "cache_mb": result.cache_mb,
                "curve": [
                    dict(zip(("step", "seconds", "mrr", "recall_at_10"), point, strict=True))
                    for point in result.curve
                ],
            }
            for method, result in results.items()
        },
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def plot(results: dict[str, Result], settings: Settings, items: int, path: Path) -> None:
    """Draw MRR against steps and against training time, a curve for each method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    styles = {IN_BATCH: ("dimgray", "s"), PAPER: ("tab:orange", "^"), DEFAULTS: ("tab:blue", "o")}
    highest = max(result.curve[-1][2] for result in results.values())
    for method, result in results.items():
        color, marker = styles[method]
        steps, seconds, mrr, _ = zip(*result.curve, strict=True)
        for axes, along in ((by_step, steps), (by_time, seconds)):
            axes.plot(along, mrr, color=color, marker=marker, markersize=5, label=method)
            axes.annotate(
                f"{mrr[-1]:.3f}",
                (along[-1], mrr[-1]),
                (8, 6 if mrr[-1] == highest else -10),  # keep close figures apart
                textcoords="offset points",
                va="center",
                color=color,
            )
    best = max(point[2] for result in results.values() for point in result.curve)
    by_step.set(xlabel="training step", ylabel="MRR of held-out queries", ylim=(0, 1.15 * best))
    by_time.set(xlabel="seconds of training, without evaluation")
    for axes in (by_step, by_time):
        axes.margins(x=0.13)  # room for the last figures
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(b=False)
    by_step.legend(loc="lower right", frameon=False)
    figure.suptitle(
        f"Searching {items:,} functions, trained at batch {settings.batch_size}: "
        f"in-batch negatives against a cache of {settings.cache_size:,}"
    )
    figure.savefig(path, dpi=150)


def save_model(result: Result, pairs: list[Pair], data: Data, out: Path) -> None:
    """Save the weights and every item's embedding as tensors, and the items' locations."""
    model = SearchModel()
    weights = {key: torch.from_numpy(value) for key, value in result.weights.items()}
    model.load_state_dict(weights)
    items = [{"where": f"{pair.where} {pair.name}", "sentence": pair.query} for pair in pairs]
    (out / "items.json").write_text(json.dumps(items), encoding="utf-8")
    embeddings = embed_all_items(model, data.items)
    torch.save({"weights": weights, "item_embeddings": embeddings}, out / "model.pt")


@torch.no_grad()
def search(query: str, out: Path, results: int = 5) -> None:
    """Print the saved model's best items for a query, best first, with their cosines."""
    if not (out / "model.pt").exists():
        raise SystemExit(f"no model in {out}: run `python {sys.argv[0]} train` first.")
    if not words(query):
        raise SystemExit(f"the query {query!r} has no words: describe what the code should do.")
    saved = torch.load(out / "model.pt", weights_only=True)
    items = json.loads((out / "items.json").read_text(encoding="utf-8"))
    model = SearchModel()
    model.load_state_dict(saved["weights"])
    tokens = torch.from_numpy(query_tokens([query]))
    scores = saved["item_embeddings"] @ model.embed_queries(tokens)[0]
    print(f"\n{query}")
    for score, row in zip(*scores.topk(min(results, len(items))), strict=True):
        item = items[row]
        print(f"  {score:.2f}  {item['where']}\n        {item['sentence']}")


def positive_int(text: str) -> int:
    """Read a command-line number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="train with every method and compare")
    trainer.add_argument("--steps", type=positive_int, default=2000)
    trainer.add_argument("--batch-size", type=positive_int, default=16)
    trainer.add_argument("--cache-size", type=positive_int, default=8192)
    trainer.add_argument("--seed", type=int, default=0)
    trainer.add_argument("--max-pairs", type=positive_int, help="mine at most this many pairs")
    searcher = commands.add_parser("search", help="answer a query from the saved model")
    searcher.add_argument("query", help='such as "parse an ISO date"')
    for command in (trainer, searcher):
        command.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    options = parser.parse_args()
    if options.command == "search":
        search(options.query, options.out)
        return
    if options.cache_size < options.batch_size:
        parser.error("--cache-size must be at least --batch-size, which enters it at each step")
    settings = Settings(options.steps, options.batch_size, options.cache_size, options.seed)
    train(settings, options.max_pairs, options.out)


if __name__ == "__main__":
    main()

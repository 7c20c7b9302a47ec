"""The modules of the tournament, and a tiny task for it."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ITEMS, WORDS, BUCKETS = 300, 6, 128


@pytest.fixture(scope="module")
def tournament():
    import torch  # noqa: PLC0415 - not for the other tests of this room

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import training_at_equal_encoder_calls as script  # noqa: PLC0415 - found from here on
        from tournament import (  # noqa: PLC0415
            against_cache,
            choosing,
            drift,
            in_batch,
            keeping,
            method,
            methods,
            plan,
            report,
            results,
            running,
            score_errors,
            task,
            towers,
            training,
        )

        patch.setitem(running.TASKS, "tiny", lambda _: tiny(task))
        modules = (
            *(against_cache, choosing, drift, in_batch, keeping, method, methods, plan, report),
            *(results, running, score_errors, task, towers, training),
        )
        names = {module.__name__.rpartition(".")[2]: module for module in modules}
        yield SimpleNamespace(
            script=script, tiny=partial(tiny, task), run_of=partial(run_of, training), **names
        )
    torch.set_num_threads(threads)


def tiny(tasks):
    """Return a task where an item is its query's words, each under another number."""
    rng = np.random.default_rng(0)
    queries = rng.integers(1, BUCKETS, (ITEMS, WORDS), np.int32)
    validation, test = np.arange(0, ITEMS, 10), np.arange(1, ITEMS, 10)
    return tasks.Task(
        queries=queries,
        items=BUCKETS - queries,
        item_of=np.arange(ITEMS),
        train=np.flatnonzero(np.arange(ITEMS) % 10 > 1),
        validation=tasks.Questions(validation, validation[:, None]),
        test=tasks.Questions(test, test[:, None]),
        query_buckets=BUCKETS,
        item_buckets=BUCKETS,
    )


def run_of(training, method="in-batch", batch=8, **changes):
    given = {"rate": 0.02, "seed": 0, "budget": 2_000, "options": {"cache_size": 64}, **changes}
    return training.Run("tiny", "separate", method, batch, **given)

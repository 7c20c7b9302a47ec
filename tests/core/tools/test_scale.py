"""The calculator: the laws of its figures, the memory of real arrays, and what the page prints."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import negcache_core
from negcache_core import CapacityError, DTypeError, KindError, OptionError, scaling
from negcache_core.arrays.backend import NUMPY
from negcache_core.retrieval.scorer import Scorer
from negcache_core.retrieval.softmax_draw import weigh_blocks
from negcache_core.retrieval.tiled_scores import scores_of
from negcache_core.tools.step_cost_report import _readable

PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
CASES = st.fixed_dictionaries(
    {
        "width": st.integers(1, 1024),
        "dtype": st.sampled_from(["int8", "float16", "bfloat16", "float32", "float64"]),
        "feature_bytes": st.integers(0, 512),
        "num_samples": st.integers(1, 4),
        "estimator": st.sampled_from(["paper", "shared", "exact_query"]),
        "in_batch_negatives": st.booleans(),
        "id_bytes": st.sampled_from([0, 4, 8]),
    }
)


@given(CASES, st.integers(1, 6), st.integers(1, 64))
def test_twice_the_ranks_hold_and_score_half(case, log_ranks, part):
    ranks, slots = 2**log_ranks, 2**20
    one, two = (
        scaling(slots, batch_size=2 * ranks * part, world_size=world, **case)
        for world in (ranks, 2 * ranks)
    )
    assert one.table_bytes == 2 * two.table_bytes
    assert one.work["block weights"] == 2 * two.work["block weights"]
    assert one.multiply_adds["scores"] == 2 * two.multiply_adds["scores"]
    # What is gathered of the queries is the same in all ranks' sum, but for a rank's own part.
    parts = [each.sent["queries"] / (each.world_size - 1) for each in (one, two)]
    assert parts[0] == 2 * parts[1]


@given(CASES, st.integers(1, 8), st.integers(8, 10**9))
def test_what_is_sent_never_depends_on_the_capacity(case, ranks, slots):
    def sent(slots):
        return scaling(slots, batch_size=8 * ranks, world_size=ranks, **case).sent

    assert sent(max(slots, ranks**2)) == sent(10**6)


@given(CASES, st.integers(1, 10**9))
def test_one_rank_sends_nothing_and_holds_all(case, slots):
    found = scaling(slots, batch_size=8, **case)
    assert found.sent_bytes == found.sent_by_all == 0
    itemsize = {"float64": 8, "float32": 4, "int8": 1}.get(case["dtype"], 2)
    scale = 4 * (case["dtype"] == "int8")
    row = itemsize * case["width"] + scale + case["feature_bytes"] + case["id_bytes"] + 4
    assert found.table_bytes == slots * row


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
def test_memory_is_that_of_the_arrays(dtype):
    slots, width, batch = 1000, 8, 16
    manager = negcache_core.CacheManager(
        {
            "x": negcache_core.FieldSpec((3,), "float32"),
            "embedding": negcache_core.FieldSpec((width,), dtype),
        },
        slots,
    ).storing("embedding")
    cache = manager.init_cache()
    told = {"batch_size": batch, "feature_bytes": 12, "dtype": dtype, "tile_bytes": 2**16}
    found = scaling(slots, width, **told)
    parts = [rows.nbytes for key, rows in cache.data.items() if key.startswith("embedding")]
    assert found.tables["embeddings"] == sum(parts)
    assert found.table_bytes == sum(each.nbytes for each in [*cache.data.values(), cache.age])
    queries = np.ones((batch, width), "float32")
    wide = np.float64 if dtype == "float64" else np.float32
    scores = scores_of(
        queries, {"cache": cache}, "embedding", Scorer(None, None, wide, NUMPY.xp), NUMPY, 2**16
    )
    weights, _ = weigh_blocks(scores)
    assert found.work["block weights"] == weights.nbytes
    per_slot = weights.itemsize * (2 * batch + (width if dtype in ("float16", "int8") else 0))
    assert found.work["tile"] == scores[0].tile * per_slot


def test_the_page_prints_what_the_calculator_says():
    example = re.search(r"    >>> print\((scaling\(.*\))\)\n((?:    .*\n)+)", PAGE)
    assert textwrap.dedent(example[2]) == f"{eval(example[1])}\n"  # noqa: S307 - our own page
    rows = re.findall(r"^\| (1e\d) \| (\d+) \| ([\d,]+) \| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 13
    for slots, width, queries, ranks, rest in rows:
        paper, exact = (
            scaling(
                int(float(slots)),
                int(width),
                batch_size=int(queries.replace(",", "")),
                world_size=int(ranks),
                feature_bytes=256,
                dtype="bfloat16",
                **options,
            )
            for options in ({}, {"estimator": "exact_query", "in_batch_negatives": True})
        )
        figures = (paper.table_bytes, paper.work["block weights"], paper.work_bytes)
        products = f"{paper.multiply_adds['scores'] / 1e12:.3g}"
        sent = (paper.sent_bytes, exact.sent_bytes)
        cells = [
            *(_readable(n, "B") for n in figures),
            products,
            *(_readable(n, "B") for n in sent),
        ]
        assert rest.split(" | ") == cells


def test_it_prints_readably():
    lines = str(
        scaling(10**9, 128, batch_size=8192, world_size=64, feature_bytes=256, dtype="bfloat16")
    ).splitlines()
    assert lines[0] == "one of 64 ranks, 15,625,000 slots"
    assert lines[1].split() == ["tables", "8.06", "GB"]
    assert "  block weights                         4 GB" in lines
    assert not any(" 0 " in line for line in lines)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"batch_size": 7, "world_size": 2},
            OptionError,
            "batch_size is 7 and world_size 2: .*equal parts",
        ),
        (
            {"cache_size": 5, "world_size": 4},
            CapacityError,
            "leaves a rank of 4 without a slot: raise cache_size",
        ),
        ({"cache_size": 0}, OptionError, "cache_size is 0: expected at least 1"),
        ({"width": 1.5}, KindError, "width is 1.5: expected an int"),
        ({"num_samples": True}, KindError, "num_samples is True: expected an int"),
        ({"feature_bytes": -1}, OptionError, "feature_bytes is -1: expected at least 0"),
        ({"dtype": "int16"}, DTypeError, "dtype is 'int16': expected one of"),
        ({"tower_dtype": "int8"}, DTypeError, "tower_dtype is 'int8': expected one of"),
        ({"tower_dtype": None}, DTypeError, "tower_dtype is None"),
        ({"estimator": "best"}, OptionError, "estimator is 'best'"),
        ({"estimator": "exact_query", "top_k": 2}, OptionError, "leave top_k out"),
        ({"top_k": 101}, CapacityError, "top_k is 101, but there are 100 slots"),
        ({"draws_elsewhere": 9}, OptionError, "draws_elsewhere is 9 of 8 draws"),
    ],
)
def test_bad_input_is_told(given, error, message):
    arguments = {"cache_size": 100, "width": 4, "batch_size": 8, "feature_bytes": 4, **given}
    with pytest.raises(error, match=message):
        scaling(**arguments)


def test_a_tile_and_a_draw_are_not_there_at_once():
    found = scaling(1_000_000, 16, batch_size=8, feature_bytes=4)
    tile, drawing = found.work["tile"], found.work["drawing"]
    assert found.work_bytes == found.work["block weights"] + max(tile, drawing)
    assert drawing == 8 * 7_813 * (4 + 13)  # copied weights, their sums, and comparisons
    wide = scaling(1_000, 768, batch_size=8, feature_bytes=4, dtype="bfloat16")
    assert wide.work["drawing"] == 8 * (8 * 4 + 128 * 768 * 6)  # rows of a block, and in float32

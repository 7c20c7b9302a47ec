"""Real processes over gloo: with use_cross_replica every rank ends each step with one cache."""

import os

import negcache_torch as negcache
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import run, run_program

RANKS = 2


def train(rank):
    specs = {
        "x": negcache.FieldSpec((2,), torch.float32),
        "flag": negcache.FieldSpec((), torch.bool),
        "embedding": negcache.FieldSpec((2,), torch.bfloat16),
    }
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(specs, 16),
        negcache.CacheClassificationLoss("embedding", ("x",), generator=rank),
        embedding_key="embedding",
        data_keys=("x",),
        use_cross_replica=True,
    )
    weight = torch.eye(2, requires_grad=True)
    for step in range(6):
        rows = (step + rank) % 4  # ranks differ, and some batches are empty
        x = torch.full((rows, 2), 1.0 + rank + 10 * step)
        features = {"x": x, "flag": torch.full((rows,), bool(rank))}
        loss = handler.update_cache_and_compute_loss(
            lambda features, weight=weight: features["x"] @ weight, x, x @ weight, features
        )
        loss.backward()
        with torch.no_grad():
            weight -= 0.01
        assert_equal_on_all_ranks(handler.cache)
    assert int((handler.cache.age == 0).sum()) >= 3
    assert set(handler.cache.data["flag"].tolist()) == {True, False}

    def unlike(features):  # as dropout may be
        return features["x"] * 0.0 + rank + 1.0

    handler.refresh(unlike, 5)
    assert_equal_on_all_ranks(handler.cache)
    assert int((handler.cache.data["embedding"] == 1.0).all(1).sum()) == 5
    corpus = {"x": torch.full((9, 2), 3.0), "flag": torch.ones(9, dtype=torch.bool)}
    handler.prefill(unlike, corpus, 4)
    assert_equal_on_all_ranks(handler.cache)
    assert int((handler.cache.data["x"] == 3.0).all(1).sum()) == 9


def assert_equal_on_all_ranks(cache):
    for value in [*cache.data.values(), cache.age]:
        copies = [torch.empty_like(value) for _ in range(RANKS)]
        dist.all_gather(copies, value.contiguous())
        assert torch.equal(*copies)


def average_over_unequal_parts(rank):
    """The mean over ranks of losses and gradients is that of one process with the whole batch."""
    specs = {
        "x": negcache.FieldSpec((2,), torch.float64),
        "embedding": negcache.FieldSpec((2,), torch.float64),
    }

    def handler_of(*, replicated):
        return negcache.CacheLossHandler(
            negcache.CacheManager(specs, 16),
            negcache.CacheClassificationLoss("embedding", ("x",), generator=0),
            embedding_key="embedding",
            data_keys=("x",),
            use_cross_replica=replicated,
        )

    ours, theirs = handler_of(replicated=True), handler_of(replicated=False)
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
    for step, sizes in enumerate([(3, 1), (0, 2), (2, 2), (1, 4)]):
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(sum(sizes), 2, dtype=torch.float64, generator=rng)
        noise = torch.rand(sum(sizes), 1, 2, dtype=torch.float64, generator=rng)
        values = []
        for handler, part in (
            (ours, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))),
            (theirs, slice(None)),
        ):
            features = {"x": x[part]}
            loss = handler.update_cache_and_compute_loss(
                lambda features: features["x"] @ weight,
                x[part],
                x[part] @ weight,
                features,
                noise=noise[part],
            )
            values.append([loss.detach(), *torch.autograd.grad(loss, [weight])])
        for mine in values[0]:
            dist.all_reduce(mine)
        for mine, whole in zip(*values, strict=True):
            torch.testing.assert_close(mine / RANKS, whole)
        torch.testing.assert_close(ours.cache.data, theirs.cache.data)


def test_the_average_over_unequal_parts_is_that_of_the_whole_batch(tmp_path):
    run(tmp_path, average_over_unequal_parts, ranks=RANKS)


def test_every_rank_has_the_same_cache(tmp_path):
    run(tmp_path, train, ranks=RANKS)


def fails(rank):
    assert rank != 1, "rank 1 fails on purpose"
    os._exit(0)  # nobody waits for it


def test_a_failing_rank_fails_the_suite(tmp_path):
    with pytest.raises(mp.ProcessRaisedException, match="rank 1 fails on purpose"):
        run(tmp_path, fails, ranks=RANKS)


@pytest.mark.parametrize("last", ["assert rank != 1", "sys.exit(rank)"])
def test_a_program_that_fails_on_a_rank_fails_the_suite(tmp_path, last):
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys\nrank = int(os.environ['RANK'])\n{last}")
    with pytest.raises(mp.ProcessRaisedException, match="Process 1 terminated"):
        run_program(program, ranks=RANKS)


def test_one_process_without_a_group_is_told_what_to_do():
    specs = {"x": negcache.FieldSpec((2,), "float32"), "e": negcache.FieldSpec((2,), "float32")}
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(specs, 4),
        negcache.CacheClassificationLoss("e", ("x",), generator=0),
        "e",
        ("x",),
        use_cross_replica=True,
    )
    x = torch.ones(1, 2)
    with pytest.raises(negcache.OptionError, match=r"torch\.distributed is not init"):
        handler.update_cache_and_compute_loss(lambda features: features["x"], x, x, {"x": x})

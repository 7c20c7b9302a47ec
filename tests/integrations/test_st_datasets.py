"""Several data sets in one training: whose texts compete, one loss or many, one process or two."""

import bisect
from collections import Counter
from pathlib import Path

import negcache_torch as negcache
import pytest
import torch
from datasets import DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from negcache_sentence_transformers._datasets import SameDataset
from programs import words_of
from ranks import run_program
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from st_trainings import (
    checkpoint_of,
    dcp_tables,
    saved,
    told,
    two_data_sets,
    warned,
    written,
)
from text_oracle import Recorder, expected_losses
from tiny_transformer import BATCH, make_model, make_pairs, make_trainer, weights
from torch import nn
from torch.utils.data import ConcatDataset, RandomSampler

RANKS = Path(__file__).with_name("st_datasets_ranks.py")


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def test_several_data_sets_on_two_processes(tmp_path):
    cases = [
        ("pairs_beside_triplets", tmp_path / "mixed", "together"),
        ("pairs_beside_triplets", tmp_path / "grouped", "grouped"),
        ("a_dict_of_losses", tmp_path / "proportional", "proportional"),
        ("a_dict_of_losses", tmp_path / "turns", "round_robin"),
        ("an_older_checkpoint", tmp_path / "older"),
        ("the_best_model", tmp_path / "best"),
    ]
    run_program(RANKS, *words_of(cases), ranks=2)


@pytest.mark.parametrize("sampler", [RoundRobinBatchSampler, ProportionalBatchSampler])
def test_batches_of_one_data_set_follow_each_other(sampler):
    """Each once an epoch, in another order in each; what is left over is too little for a step."""
    sizes, size, count = [14, 9, 25], 2, 3
    generator = torch.Generator()
    data = ConcatDataset([range(each) for each in sizes])

    def samplers(*, drop_last):
        return [
            DefaultBatchSampler(RandomSampler(each, generator=generator), size, drop_last)
            for each in data.datasets
        ]

    for drop_last in (True, False):
        options = {"generator": generator, "seed": 5}
        batches = SameDataset(
            sampler, count, dataset=data, batch_samplers=samplers(drop_last=drop_last), **options
        )
        epochs = []
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            epochs.append(list(batches))
        assert epochs[0] == epochs[2] != epochs[1]
        for found in epochs:
            assert len(found) == len(batches)
            steps = list(zip(*[iter(found)] * count, strict=True))
            of = [
                {bisect.bisect(data.cumulative_sizes, row) for batch in step for row in batch}
                for step in steps
            ]
            assert all(len(each) == 1 for each in of)
            each = Counter(place for (place,) in of)
            # Of 7, 4 (or 5) and 12 (or 13) batches, by threes.
            steps_of = [1, 1, 1] if sampler is RoundRobinBatchSampler else [2, 1, 4]
            assert [each[place] for place in range(3)] == steps_of
            rows = [row for batch in found for row in batch]
            assert len(set(rows)) == len(rows)
            assert all(batch for batch in found)
    with pytest.raises(
        negcache.OptionError, match=r"have \[14, 9, 25\] rows, and number 1 makes only"
    ):
        SameDataset(sampler, 5, dataset=data, batch_samplers=samplers(drop_last=True), **options)


@pytest.mark.parametrize("grouped", [False, True])
def test_only_texts_of_the_own_data_set_compete(model, tmp_path, grouped):
    data = two_data_sets(3 * BATCH)
    loss = NegativeCacheLoss(model, 64, max_staleness=None, group_by_dataset=grouped, generator=0)
    recorder = Recorder(loss)
    run = {"max_steps": 6, "learning_rate": 0.0, "multi_dataset_batch_sampler": "round_robin"}
    trainer = make_trainer(tmp_path, model, loss, data, **run)
    keep_cache(trainer)  # again: it is told of each batch once
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    steps = [[batch] for batch in recorder.batches]
    assert [name for name, _ in recorder.batches] == [*data] * 3 if grouped else [None] * 6
    torch.testing.assert_close(
        logged, expected_losses(steps, grouped=grouped), rtol=1e-4, atol=1e-5
    )
    # A text that both data sets have is in both of them.
    positives = [set(data[name]["positive"]) for name in data]
    negatives = set(data["triplets"]["negative"])
    shared = len(positives[0] & positives[1])
    assert shared >= BATCH
    assert written(loss) == len(positives[0] | positives[1] | negatives) + shared * grouped


def test_evaluation_knows_the_data_set_of_a_batch(model, tmp_path):
    data = two_data_sets(2 * BATCH)
    loss = NegativeCacheLoss(model, 64, group_by_dataset=True, max_staleness=None, generator=0)
    trainer = make_trainer(tmp_path, model, loss, data, max_steps=4, learning_rate=0.0)
    empty = trainer.evaluate()
    assert empty["eval_pairs_loss"] > 0
    assert written(loss) == 0
    trainer.train()
    full = trainer.evaluate()
    assert full["eval_pairs_loss"] > empty["eval_pairs_loss"] + 0.1
    assert trainer.evaluate(DatasetDict(pairs=data["pairs"])).keys() >= {"eval_pairs_loss"}
    predicted = trainer.predict(DatasetDict(pairs=data["pairs"]))
    torch.testing.assert_close(predicted.metrics["test_loss"], full["eval_pairs_loss"])
    with pytest.raises(negcache.OptionError, match="does not say which data set"):
        trainer.evaluate(make_pairs(4))
    with pytest.raises(negcache.OptionError, match="train_dataset is a Dataset: expected a Data"):
        make_trainer(tmp_path, model, loss, make_pairs(4))
    trainer.eval_dataset = DatasetDict(others=make_pairs(4))
    with pytest.raises(negcache.OptionError, match=r"eval_dataset has \['others'\], which train"):
        keep_cache(trainer)


class Twice(nn.Module):
    """A loss around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features, labels):
        return 2 * self.inner(features, labels)


def test_a_dict_of_our_losses_and_others(tmp_path, caplog):
    data = two_data_sets(2 * BATCH)
    data["plain"], data["again"] = make_pairs(2 * BATCH), make_pairs(2 * BATCH)

    def run(folder, resume=None, leave_out=(), more=()):
        model = make_model(tmp_path / "model", dropout=0.1)
        pairs = NegativeCacheLoss(model, 16, generator=1)
        losses = {
            "pairs": pairs,
            "triplets": Twice(NegativeCacheLoss(model, 32, group_by_dataset=True, generator=2)),
            "plain": MultipleNegativesRankingLoss(model),
            "again": pairs,
        }
        for name in leave_out:
            losses[name] = MultipleNegativesRankingLoss(model)
        for name in more:
            losses[name] = NegativeCacheLoss(model, 8, generator=5)
        options = {"max_steps": 12, "multi_dataset_batch_sampler": "round_robin"}
        trainer = make_trainer(
            tmp_path / folder, model, losses, data, save_strategy="steps", save_steps=6, **options
        )
        trainer.train(resume_from_checkpoint=resume)
        kept = (
            [weights(each.handler) for each in (pairs, losses["triplets"].inner)]
            if not (leave_out)
            else []
        )
        return trainer, [weights(model), *kept]

    trainer, whole = run("one")
    checkpoint = checkpoint_of(tmp_path / "one", 6)
    names = {key.partition(".tables")[0] for key in dcp_tables(saved(checkpoint)) if "age" in key}
    assert names == {"pairs", "triplets.inner"}  # of two names for one loss, the first
    resumed, again = run("two", str(checkpoint))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert told(resumed)[6:-1] == told(trainer)[6:-1]
    assert not warned(caplog)
    logged = [row["cache_fill"] for row in trainer.state.log_history if "cache_fill" in row]
    assert len(logged) == 9  # and nothing, instead of NaN, for the other loss's steps
    run("three", str(checkpoint), leave_out=["triplets"])
    assert "cache for the loss 'triplets.inner' is ignored" in caplog.text
    run("four", str(checkpoint), more=["plain"])
    assert "has no cache for the loss 'plain', which starts with the cache it has" in caplog.text
    with pytest.raises(negcache.CheckpointError, match=r"for the losses \['pairs', 'triplets.in"):
        run("five", str(checkpoint), leave_out=["pairs", "triplets", "again"], more=["plain"])

"""The trainer around the loss: several data sets, old and new checkpoints, what else it can do."""

import bisect
import copy
import logging
import shutil
import warnings
from collections import Counter
from pathlib import Path

import negcache_torch as negcache
import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from negcache_sentence_transformers._datasets import SameDataset
from programs import torchrun, words_of
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import (
    DefaultBatchSampler,
    ProportionalBatchSampler,
    RoundRobinBatchSampler,
)
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from text_oracle import Recorder, expected_losses
from tiny_transformer import BATCH, make_model, make_pairs, make_texts, make_trainer, weights
from torch import nn
from torch.utils.data import ConcatDataset, RandomSampler
from transformers import TrainerCallback, TrainerState

RANKS = Path(__file__).with_name("st_trainer_ranks.py")
SAVE = {"save_strategy": "steps", "save_steps": 2}
WINDOW = "loss.tables.window.state"


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def two_data_sets(size):
    """Pairs and triplets, which have some positives in common."""
    texts = make_texts(3 * size, seed=1)
    pairs = make_pairs(size)
    columns = [texts[first::3] for first in range(3)]
    columns[1][:BATCH] = pairs["positive"][:BATCH]
    named = dict(zip(("anchor", "positive", "negative"), columns, strict=True))
    return DatasetDict(pairs=pairs, triplets=Dataset.from_dict(named))


def told(trainer):
    """What a trainer logged, without what clocks say."""
    return [
        {key: value for key, value in row.items() if "runtime" not in key and "per_sec" not in key}
        for row in trainer.state.log_history
    ]


def warned(caplog):
    """What our own loggers said."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("negcache")]


def written(loss):
    return int((loss.handler.cache.age != negcache.EMPTY).sum())


def checkpoint_of(folder, step=2):
    return folder / f"checkpoint-{step}"


def saved(checkpoint):
    (folder,) = checkpoint.glob("negcache-*")
    return folder


def test_several_data_sets_on_two_processes(tmp_path):
    cases = [
        ("pairs_beside_triplets", tmp_path / "mixed", "together"),
        ("pairs_beside_triplets", tmp_path / "grouped", "grouped"),
        ("a_dict_of_losses", tmp_path / "proportional", "proportional"),
        ("a_dict_of_losses", tmp_path / "turns", "round_robin"),
        ("an_older_checkpoint", tmp_path / "older"),
        ("the_best_model", tmp_path / "best"),
    ]
    torchrun(2, RANKS, *words_of(cases))


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
        negcache.OptionError, match=r"have \[14, 9, 25\] rows, and number 1 of them"
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
    with pytest.raises(negcache.OptionError, match="does not say of which data set"):
        trainer.evaluate(make_pairs(4))
    with pytest.raises(negcache.OptionError, match="train_dataset is a Dataset: expected a Data"):
        make_trainer(tmp_path, model, loss, make_pairs(4))
    trainer.eval_dataset = DatasetDict(others=make_pairs(4))
    with pytest.raises(negcache.OptionError, match=r"eval_dataset has \['others'\], which train"):
        keep_cache(trainer)


class Falling(SentenceEvaluator):
    """The first evaluation is the best."""

    def __init__(self):
        super().__init__()
        self.score = 1.0

    def __call__(self, *_, **__):
        self.score -= 0.1
        return {"score": self.score}


def best_at_end(folder, model, loss, data, **options):
    """A trainer that evaluates every second step, and keeps the first of what it evaluates."""
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_score",
            "greater_is_better": True,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **SAVE,
            **options,
        },
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=loss, evaluator=Falling()
    )
    return keep_cache(trainer)


def test_the_best_model_comes_back_with_its_cache(tmp_path, caplog):
    data, runs = make_pairs(24), {}

    def run(name, folder="out", steps=6, resume=None, **options):
        model = make_model(tmp_path / "model")
        loss = NegativeCacheLoss(model, 32, generator=3)
        if options.pop("plain", False):
            trainer = make_trainer(
                tmp_path / folder, model, loss, data, max_steps=steps, num_train_epochs=1, **options
            )
        else:
            trainer = best_at_end(tmp_path / folder, model, loss, data, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume)
        runs[name] = {**weights(model), **weights(loss.handler)}
        return trainer

    # The rate falls with max_steps, so the first two steps are those of a run of six.
    run("whole")
    first = checkpoint_of(tmp_path / "out")
    cache = dcp_tables(saved(first))
    for key, value in cache.items():
        torch.testing.assert_close(runs["whole"][key.removeprefix("loss.")], value, msg=key)
    assert (cache["loss.tables.cache_cache.age"] != negcache.EMPTY).sum() == 2 * BATCH

    # Resumed elsewhere from a later checkpoint, the best one is still that of the first run.
    run("resumed", "later", resume=str(checkpoint_of(tmp_path / "out", 4)))
    torch.testing.assert_close(runs["resumed"], runs["whole"], rtol=0, atol=0)

    trainer = run("limited", "limited", save_total_limit=1)
    torch.testing.assert_close(runs["limited"], runs["whole"], rtol=0, atol=0)
    assert [each.name for each in (tmp_path / "limited").glob("checkpoint-*")] == ["checkpoint-2"]
    assert trainer.state.best_model_checkpoint == str(checkpoint_of(tmp_path / "limited"))

    assert not warned(caplog)
    run("bare", "bare", save_only_model=True)
    assert "the cache is that of the last step: none was saved there" in caplog.text
    assert (runs["bare"]["tables.cache_cache.age"] != negcache.EMPTY).sum() == 6 * BATCH


def dcp_tables(folder):
    tables = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in tables.items()
    }
    exchange(dcp.load, state, folder)
    return state


def exchange(verb, state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        verb(state, checkpoint_id=folder)


class First(TrainerCallback):
    """Remembers what a loss has in its cache when the first step begins."""

    def __init__(self, loss):
        self.loss, self.state = loss, None

    def on_step_begin(self, *_, **__):
        if self.state is None:
            self.state = weights(self.loss.handler)


@pytest.fixture
def run(tmp_path):
    """Train, perhaps from a checkpoint; return the loss and the trainer."""

    def go(folder, resume=None, *, steps=4, start_empty=False, keys=(), **options):
        model = make_model(tmp_path / "model")
        loss = NegativeCacheLoss(model, **{"cache_size": 32, "generator": 3, **options})
        trainer = make_trainer(
            tmp_path / folder, model, loss, make_pairs(24), keep=False, max_steps=steps, **SAVE
        )
        keep_cache(trainer, start_empty=start_empty)
        go.loss, first = loss, First(loss)
        trainer.add_callback(first)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        go.first = first.state
        return loss, trainer

    return go


def without(checkpoint, lost):
    """Change a checkpoint to one that was saved without some tables."""
    folder = saved(checkpoint)
    state = {key: value for key, value in dcp_tables(folder).items() if key not in lost}
    shutil.rmtree(folder)
    exchange(dcp.save, state, folder)


def test_an_older_checkpoint_has_no_window_yet(run, tmp_path):
    run("old", max_staleness=0.2)
    checkpoint = checkpoint_of(tmp_path / "old")
    without(checkpoint, [WINDOW])
    _, trainer = run("new", checkpoint, max_staleness=0.2)
    assert trainer.state.global_step == 4
    assert run.first["tables.window.state"].tolist() == [4.0, 0, 0, 0, 0, 0]
    assert (run.first["tables.cache_cache.age"] != negcache.EMPTY).sum() == 2 * BATCH
    # Rows of any age compete at first, also older ones than a new window lets in.
    state = dcp_tables(saved(checkpoint))
    state["loss.tables.cache_cache.age"][:BATCH] = 100
    exchange(dcp.save, state, saved(checkpoint))
    run("newer", checkpoint, max_staleness=0.2)
    assert run.first["tables.window.state"].tolist() == [100.0, 0, 0, 0, 0, 0]
    # Saved with a window, and resumed by a loss that has none.
    loss, _ = run("none", checkpoint_of(tmp_path / "old", 4), steps=6, max_staleness=None)
    assert written(loss) == 6 * BATCH


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(run, tmp_path, caplog):
    run("old")
    checkpoint = checkpoint_of(tmp_path / "old")

    def refuses(words, **options):
        with pytest.raises(negcache.CheckpointError, match=words) as error:
            run("new", checkpoint, **options)
        assert "keep_cache(trainer, start_empty=True)" in str(error.value)
        assert written(run.loss) == 0
        assert run.loss.handler.cache.data["embedding"].abs().sum() == 0

    refuses("'loss' with cache_size=32, where it has 16", cache_size=16)
    refuses(
        r"'input_ids' of shape \(32, 16\) and torch.int32, where it has \(32, 12\)", max_length=12
    )
    refuses(
        "'embedding' of shape .* and torch.float32, where it has .* torch.float16",
        dtype=torch.float16,
    )
    folder = saved(checkpoint)
    shutil.copytree(folder, tmp_path / "kept")
    without(checkpoint, ["loss.tables.cache_cache.field_id"])
    refuses(r"of 'loss' without \['id'\]")
    (folder / ".metadata").write_bytes(b"cut")
    with pytest.raises(negcache.CheckpointError, match="cannot be read"):
        run("new", checkpoint)
    caplog.clear()
    loss, trainer = run("new", checkpoint, start_empty=True, cache_size=16)
    assert trainer.state.global_step == 4
    assert written(loss) == 2 * BATCH  # those of its own steps
    assert not warned(caplog)  # there was nothing to lose
    assert saved(checkpoint_of(tmp_path / "new", 4)).is_dir()
    # A field that the loss does not have, such as one of a loss that had groups.
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)
    state = dcp_tables(folder)
    state["loss.tables.cache_cache.field_dataset"] = torch.zeros(32, dtype=torch.int64)
    exchange(dcp.save, state, folder)
    refuses(r"of 'loss' with \['dataset'\], which it has not")


def test_a_checkpoint_of_the_model_alone(model, tmp_path):
    data, loss = make_pairs(24), NegativeCacheLoss(model, 32, generator=0)
    trainer = make_trainer(tmp_path / "out", model, loss, data, save_only_model=True, **SAVE)
    trainer.train()
    checkpoint = checkpoint_of(tmp_path / "out")
    assert not [*checkpoint.glob("negcache-*")]
    trainer = make_trainer(tmp_path / "on", model, loss, data)
    with pytest.raises(negcache.OptionError, match="as with save_only_model, go on with an empty"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    keep_cache(trainer, start_empty=True).train(resume_from_checkpoint=str(checkpoint))
    assert written(loss) == 2 * BATCH


def test_a_checkpoint_that_is_written_over_keeps_one_cache(run, tmp_path):
    run("out")
    old = saved(checkpoint_of(tmp_path / "out"))
    run("out")
    assert saved(checkpoint_of(tmp_path / "out")) != old


@pytest.mark.parametrize("made", ["loss", "function"])
def test_a_new_model_of_model_init_starts_with_an_empty_cache(tmp_path, made, caplog):
    data = make_pairs(24)
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )

    def make_loss(model):
        return NegativeCacheLoss(model, 32, generator=0)

    def init(_=None):
        return make_model(tmp_path / "model")

    trainer = SentenceTransformerTrainer(
        args=arguments,
        model_init=init,
        train_dataset=data,
        loss=make_loss if made == "function" else make_loss(init()),
    )
    keep_cache(trainer)
    for count in range(2):
        trainer.train()
        assert ("made a new model: its cache starts empty" in caplog.text) == bool(count)
        assert written(trainer.loss) == 2 * BATCH
        assert trainer.loss.model is trainer.model


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
    assert "cache of the loss 'triplets.inner' is left out" in caplog.text
    run("four", str(checkpoint), more=["plain"])
    assert "has no cache of the loss 'plain': it starts as it is" in caplog.text
    with pytest.raises(negcache.CheckpointError, match=r"of the losses \['pairs', 'triplets.inn"):
        run("five", str(checkpoint), leave_out=["pairs", "triplets", "again"], more=["plain"])


# Of ten pairs an epoch's third batch is short. transformers 5.23 resumes no stream that ends before
# max_steps while it accumulates, whatever the loss: it does not know where the epoch ends.
@pytest.mark.parametrize(
    ("stream", "count", "accumulated"), [(False, 10, 2), (True, 10, 1), (True, 64, 2)]
)
def test_streams_short_batches_and_accumulation_resume(tmp_path, stream, count, accumulated):
    pairs = make_pairs(count)
    data = pairs.to_iterable_dataset() if stream else pairs

    def run(folder, resume=None):
        model = make_model(tmp_path / "model", dropout=0.1)
        loss = NegativeCacheLoss(model, 16, generator=3)
        trainer = make_trainer(
            tmp_path / folder,
            model,
            loss,
            data,
            max_steps=6,
            gradient_accumulation_steps=accumulated,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, [weights(model), weights(loss.handler)]

    trainer, whole = run("one")
    assert trainer.state.global_step == 6
    resumed, again = run("two", str(checkpoint_of(tmp_path / "one", 3)))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert told(resumed)[:-1] == told(trainer)[:-1]


def test_evaluation_and_prediction_before_a_training(model, tmp_path):
    data = DatasetDict(one=make_pairs(8), two=make_pairs(12))
    loss = NegativeCacheLoss(model, 16, generator=0)
    trainer = make_trainer(tmp_path, model, loss, data, eval_on_start=True, eval_strategy="steps")
    before = copy.deepcopy(weights(loss))
    assert trainer.evaluate()["eval_two_loss"] > 0
    assert trainer.predict(make_pairs(8)).metrics["test_loss"] > 0
    torch.testing.assert_close(weights(loss), before, rtol=0, atol=0)
    trainer.train()
    assert trainer.evaluate()["eval_two_loss"] > trainer.evaluate(make_pairs(4))["eval_loss"] > 0


def test_pushed_checkpoints_are_told_of(model, tmp_path, caplog, monkeypatch):
    loss = NegativeCacheLoss(model, 16, generator=0)
    trainer = make_trainer(tmp_path, model, loss, make_pairs(8), max_steps=1)
    (keeper,) = [each for each in trainer.callback_handler.callbacks if hasattr(each, "losses")]
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    for strategy, words in (("every_save", ""), ("checkpoint", "pushed to the hub before")):
        monkeypatch.setattr(trainer.args, "hub_strategy", strategy)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            state = TrainerState(stateful_callbacks={})
            keeper.on_train_begin(trainer.args, state, trainer.control)
        assert words in caplog.text
        assert bool(words) == bool(warned(caplog))

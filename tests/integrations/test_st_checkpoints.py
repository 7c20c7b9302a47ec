"""Checkpoints of the sentence-transformers trainer: the best, old ones, ones that do not fit."""

import shutil

import negcache_torch as negcache
import pytest
import torch
import torch.distributed.checkpoint as dcp
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from st_trainings import SAVE, checkpoint_of, dcp_tables, exchange, saved, warned, written
from tiny_transformer import BATCH, make_model, make_pairs, make_trainer, weights
from transformers import TrainerCallback

WINDOW = "loss.tables.window.state"


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


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

    refuses("'loss' it has cache_size=32, but the loss has 16", cache_size=16)
    refuses(
        r"'input_ids' of shape \(32, 16\) and torch.int32, but the loss has \(32, 12\)",
        max_length=12,
    )
    refuses(
        "'embedding' of shape .* and torch.float32, but the loss has .* torch.float16",
        dtype=torch.float16,
    )
    folder = saved(checkpoint)
    shutil.copytree(folder, tmp_path / "kept")
    without(checkpoint, ["loss.tables.cache_cache.field_id"])
    refuses(r"for 'loss' it lacks \['id'\]")
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
    refuses(r"for 'loss' it has \['dataset'\], which the loss lacks")


def test_a_checkpoint_of_the_model_alone(model, tmp_path):
    data, loss = make_pairs(24), NegativeCacheLoss(model, 32, generator=0)
    trainer = make_trainer(tmp_path / "out", model, loss, data, save_only_model=True, **SAVE)
    trainer.train()
    checkpoint = checkpoint_of(tmp_path / "out")
    assert not [*checkpoint.glob("negcache-*")]
    trainer = make_trainer(tmp_path / "on", model, loss, data)
    with pytest.raises(negcache.OptionError, match="as with save_only_model, continue with an"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    keep_cache(trainer, start_empty=True).train(resume_from_checkpoint=str(checkpoint))
    assert written(loss) == 2 * BATCH


def test_a_checkpoint_that_is_written_over_keeps_one_cache(run, tmp_path):
    run("out")
    old = saved(checkpoint_of(tmp_path / "out"))
    run("out")
    assert saved(checkpoint_of(tmp_path / "out")) != old

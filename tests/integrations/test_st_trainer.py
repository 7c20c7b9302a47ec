"""What else the trainer can do with a cache: evaluate, make models anew, stream, push."""

import copy
import logging

import pytest
import torch
from datasets import DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from st_trainings import checkpoint_of, told, warned, written
from tiny_transformer import BATCH, make_model, make_pairs, make_trainer, weights
from transformers import TrainerState


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


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

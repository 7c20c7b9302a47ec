"""Accelerate and transformers.Trainer: the cache is trained, evaluated, saved and resumed as is."""

from pathlib import Path

import pytest
import torch
from cached_towers import assert_same, batch
from ranks import run_program
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def towers():
    """Import late: whoever runs other tests need not wait for transformers."""
    import trained_towers  # noqa: PLC0415

    return trained_towers


def test_accelerate_trains_as_a_loop_by_hand_and_goes_on_from_its_checkpoint(towers, tmp_path):
    whole, model, accelerator = towers.train_by_accelerate(tmp_path / "all", range(8))
    (by_hand,) = towers.train_by_hand(range(8), 1)
    assert_same(whole.state(), by_hand.state())
    towers.train_by_accelerate(tmp_path / "half", range(4))
    again, _, _ = towers.train_by_accelerate(tmp_path / "half", range(4, 8), resume=True)
    assert_same(towers.whole_state(again), towers.whole_state(whole))
    accelerator.save_model(model, tmp_path / "model")
    assert_same(load_file(tmp_path / "model" / "model.safetensors"), whole.state_dict())


def test_the_trainer_evaluates_without_a_trace_and_goes_on_from_its_checkpoint(towers, tmp_path):
    whole, quiet, again = (
        towers.model_of(towers.TrainerModel, generator=seed) for seed in (0, 0, 9)
    )
    towers.make_trainer(tmp_path / "whole", whole).train()
    towers.make_trainer(tmp_path / "quiet", quiet, eval_strategy="no").train()
    assert_same(towers.whole_state(quiet), towers.whole_state(whole))
    trainer = towers.make_trainer(tmp_path / "whole", again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(towers.whole_state(again), towers.whole_state(whole))


def test_the_best_model_comes_with_the_cache_it_had(towers, tmp_path):
    model = towers.model_of(towers.TrainerModel)
    trainer = towers.make_trainer(
        tmp_path, model, load_best_model_at_end=True, eval_steps=4, learning_rate=2.0
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-4"  # such a rate makes it worse and worse
    assert_same(load_file(best / "model.safetensors"), model.state_dict())
    assert bool((model.handler.cache.age < 4).any())


def test_an_evaluation_in_bfloat16_casts_no_row(towers, tmp_path):
    model = towers.model_of(towers.TrainerModel)
    trainer = towers.make_trainer(tmp_path, model)
    trainer.train()
    before = model.state()
    trainer = towers.make_trainer(tmp_path, model, bf16_full_eval=True)
    trainer.evaluate()
    assert model.item.weight.dtype == torch.bfloat16
    assert_same(model.state(), before)


def test_two_processes_by_accelerate_and_by_the_trainer(tmp_path):
    run_program(Path(__file__).with_name("trained_towers.py"), tmp_path, ranks=2)


def test_from_pretrained_brings_the_cache_or_says_no(towers, tmp_path):
    """It would take for initialised whatever is in the memory of a table that it does not find."""
    torch.manual_seed(0)
    model = towers.Pretrained(towers.Config())
    for seed in range(3):
        model(batch(seed))
    model.save_pretrained(tmp_path / "whole")
    other = towers.Pretrained.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert other.towers.item.weight.dtype == torch.bfloat16
    assert_same(other.towers.state(), model.towers.state())
    rest = {key: value for key, value in model.state_dict().items() if "handler" not in key}
    model.save_pretrained(tmp_path / "rest", state_dict=rest)
    with pytest.raises(AttributeError, match=r"towers\.handler\."):
        towers.Pretrained.from_pretrained(tmp_path / "rest")

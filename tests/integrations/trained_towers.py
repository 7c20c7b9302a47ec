"""Train by Accelerate and by transformers.Trainer; on two ranks: … FOLDER."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from cached_towers import STATE, Model, assert_same, batch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

ROWS = 3


class TrainerModel(Model):
    """What the trainer wants: a dict with the loss, in evaluation that against the cache."""

    def forward(self, x):
        if self.training:
            return {"loss": super().forward(x)}
        _, *given = self.arguments(x)
        return {"loss": self.handler.evaluate(None, *given).loss}


class Config(PreTrainedConfig):
    model_type = "towers"


class Pretrained(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.towers = Model()
        self.post_init()

    def forward(self, x):
        return self.towers(x)


def model_of(kind, **options):
    torch.manual_seed(0)
    return kind(**options)


def make_trainer(folder, model, **options):
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "learning_rate": 0.05,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "label_names": ["x"],  # so that evaluation asks for the loss
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    rows = [{"x": row} for row in batch(0, 24)]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:7])


def whole_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def train_by_accelerate(folder, steps, *, resume=False, **options):
    """Train a model, save or load at the start; return it as it was made, and the accelerator."""
    accelerator = Accelerator(cpu=True)
    raw = model_of(Model, **options)
    optimizer = torch.optim.Adam(raw.parameters(), 0.05)
    model, optimizer = accelerator.prepare(raw, optimizer)
    if resume:
        accelerator.load_state(str(folder))
    for step in steps:
        optimizer.zero_grad()
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(100 * accelerator.process_index + step, ROWS)))
            optimizer.step()
    if not resume:
        accelerator.save_state(str(folder))
    return raw, model, accelerator


def train_by_hand(steps, count, **options):
    """Do in one process what `count` do: a model of each, and gradients averaged."""
    models = [model_of(Model, **options) for _ in range(count)]
    optimizers = [torch.optim.Adam(model.parameters(), 0.05) for model in models]
    for step in steps:
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            model(batch(100 * rank + step, ROWS)).backward()
        for each in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(parameter.grad / count for parameter in each)
            for parameter in each:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    return models


def same_on_all(state):
    for key, value in state.items():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, value.tolist())
        assert all(part == value.tolist() for part in parts), key


def main(folder):
    rank = Accelerator(cpu=True).process_index
    # Each process has a cache of its own.
    raw, _, _ = train_by_accelerate(folder / "own", range(5))
    models = train_by_hand(range(5), 2)
    assert_same(whole_state(raw), whole_state(models[rank]))
    assert not torch.equal(*(model.handler.cache.data["x"] for model in models))
    # All have the same, which the first one saves.
    whole, _, _ = train_by_accelerate(folder / "all", range(8), replicated=True)
    train_by_accelerate(folder / "half", range(4), replicated=True)
    again, _, _ = train_by_accelerate(folder / "half", range(4, 8), resume=True, replicated=True)
    assert_same(whole_state(again), whole_state(whole))
    same_on_all(whole_state(whole))

    whole = model_of(TrainerModel, replicated=True)
    make_trainer(folder / "trainer", whole).train()
    again = model_of(TrainerModel, replicated=True, generator=7)
    trainer = make_trainer(folder / "trainer", again)
    trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-4"))
    assert_same(whole_state(again), whole_state(whole))
    same_on_all(whole_state(whole))
    assert int(whole.handler.cache.age.max()) < 8
    before = whole.state()
    trainer.evaluate()
    assert_same(whole.state(), before)
    # A cache of each: rows are those that this process has trained on.
    mine = model_of(TrainerModel)
    make_trainer(folder / "mine", mine, max_steps=4).train()
    assert set(mine.state_dict()) >= STATE
    parts = [None] * 2
    dist.all_gather_object(parts, mine.handler.cache.data["x"].tolist())
    assert not [row for row in parts[0] if row in parts[1]]
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # What wraps the models still holds gloo's group, whose end waits for a thread that waits for
    # Python's lock: seen once to hang for ever, as the process ended.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

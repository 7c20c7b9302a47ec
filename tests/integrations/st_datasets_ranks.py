"""Run by test_st_datasets.py on ranks: trainings with several data sets on two processes."""

import copy
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from datasets import Dataset, DatasetDict
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from programs import main
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from text_oracle import Recorder, expected_losses
from tiny_transformer import BATCH, make_model, make_pairs, make_texts, make_trainer, weights

with tempfile.TemporaryDirectory() as made:  # once processes are joined, the first one alone saves
    MODEL = make_model(made)


def prepare(folder):
    SentenceTransformerTrainingArguments(folder, use_cpu=True)  # joins the processes
    return copy.deepcopy(MODEL)


def every(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def pairs_and_triplets(pairs, triplets):
    texts = make_texts(3 * triplets, seed=1)
    columns = [texts[first::3] for first in range(3)]
    columns[1][:3] = make_pairs(pairs)["positive"][:3]  # texts that both have
    named = dict(zip(("anchor", "positive", "negative"), columns, strict=True))
    return DatasetDict(pairs=make_pairs(pairs), triplets=Dataset.from_dict(named))


def pairs_beside_triplets(folder, grouped):
    """In turns, one process has always pairs and the other triplets; sizes are not even."""
    model, grouped = prepare(folder), grouped == "grouped"
    data = pairs_and_triplets(3 * BATCH + 1, 3 * BATCH + 2)
    loss = NegativeCacheLoss(
        model, 128, max_staleness=None, group_by_dataset=grouped, generator=dist.get_rank()
    )
    recorder = Recorder(loss)
    options = {"multi_dataset_batch_sampler": "round_robin", "eval_strategy": "epoch"}
    options["per_device_eval_batch_size"] = BATCH
    run = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, **options}
    trainer = make_trainer(Path(folder) / "out", model, loss, data, **run)
    trainer.train()
    steps = list(zip(*every(recorder.batches), strict=True))
    assert [[len(columns) for _, columns in step] for step in steps] == [[2, 3]] * 3
    told = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    torch.testing.assert_close(told, expected_losses(steps, grouped=grouped), rtol=1e-4, atol=1e-5)
    evaluated = {key for row in trainer.state.log_history for key in row if key.endswith("_loss")}
    assert {"eval_pairs_loss", "eval_triplets_loss"} <= evaluated


def a_dict_of_losses(folder, sampler):
    """All processes are at one data set in a step, also where that has another loss; and again."""
    data = pairs_and_triplets(6 * BATCH + 1, 4 * BATCH + 3)
    data["plain"] = make_pairs(2 * BATCH + 2)
    names = []

    def run(resume=None):
        model = prepare(folder)
        losses = {
            "pairs": NegativeCacheLoss(model, 64, generator=0),
            "triplets": NegativeCacheLoss(model, 32, generator=0, group_by_dataset=True),
            "plain": MultipleNegativesRankingLoss(model),
        }
        for name, loss in losses.items():
            loss.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        trainer = make_trainer(
            Path(folder) / "out",
            model,
            losses,
            data,
            max_steps=-1,
            num_train_epochs=2,
            multi_dataset_batch_sampler=sampler,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="no",
        )
        keep_cache(trainer)  # once more: it changes nothing
        trainer.train(resume_from_checkpoint=resume)
        kept = {name: weights(losses[name].handler) for name in ("pairs", "triplets")}
        return trainer, {**weights(model), **kept}

    trainer, whole = run()
    # Of whole batches of both processes, 3, 2 and 1 an epoch; in turns as many as the fewest.
    steps = 12 if sampler == "proportional" else 6
    assert trainer.state.global_step == steps == len(names)
    assert every(names) == [names] * 2
    counts = {name: names.count(name) * 12 // steps for name in set(names)}
    in_proportion = {"pairs": 6, "triplets": 4, "plain": 2}
    assert counts == (in_proportion if steps == 12 else dict.fromkeys(counts, 4))
    logged = [row["cache_fill"] for row in trainer.state.log_history if "cache_fill" in row]
    assert len(logged) == names.count("pairs") + names.count("triplets")
    assert logged[0] == 0.0 < min(logged[-2:])
    fills = [(whole[name]["tables.cache_cache.age"] < 100).sum() for name in ("pairs", "triplets")]
    assert min(fills) > BATCH
    for name, value in weights(trainer.model).items():
        torch.testing.assert_close(every(value)[0], value, rtol=0, atol=0, msg=name)
    _, again = run(str(Path(folder) / "out" / "checkpoint-3"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def an_older_checkpoint(folder):
    """Saved without a window of ages: it opens alike in all processes, for the oldest row."""
    out = Path(folder) / "out"

    def run(steps, resume=None):
        model = prepare(folder)
        loss = NegativeCacheLoss(model, 32, max_staleness=0.2, generator=0)
        run = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(out, model, loss, make_pairs(24), **run)
        found = []
        loss.register_forward_pre_hook(lambda *_: found.append(weights(loss.handler)))
        trainer.train(resume_from_checkpoint=resume)
        return loss, found[0]

    loss, _ = run(2)
    if dist.get_rank() == 1:
        loss.handler.cache.age[0] = 100
    state = {f"loss.{key}": row for key, row in loss.handler.distributed_state_dict().items()}
    window = state.pop("loss.tables.window.state")
    (saved,) = (out / "checkpoint-2").glob("negcache-*")
    dcp.save(state, checkpoint_id=saved)
    window.fill_(3.0)
    _, first = run(4, str(out / "checkpoint-2"))
    assert first["tables.window.state"].tolist() == [100.0, 0, 0, 0, 0, 0]
    ages = [age for part in every(first["tables.cache_cache.age"].tolist()) for age in part]
    assert ages.count(100) == 1
    assert sum(age <= 100 for age in ages) == 4 * BATCH


def the_best_model(folder):
    """Its cache is in all processes that of its checkpoint."""
    model = prepare(folder)
    loss = NegativeCacheLoss(model, 32, generator=0)
    kept = {}
    loss.register_forward_pre_hook(
        lambda *_: kept.update({trainer.state.global_step: weights(loss.handler)})
    )
    trainer = make_trainer(
        Path(folder) / "out",
        model,
        loss,
        make_pairs(24),
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=BATCH,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 6, trainer.state.log_history
    torch.testing.assert_close(weights(loss.handler), kept[best], rtol=0, atol=0)
    assert [each.name for each in (Path(folder) / "out").glob("check*")] == [f"checkpoint-{best}"]


CASES = (pairs_beside_triplets, a_dict_of_losses, an_older_checkpoint, the_best_model)

if __name__ == "__main__":
    main(
        {each.__name__: each for each in CASES},
        sys.argv[1:],
    )

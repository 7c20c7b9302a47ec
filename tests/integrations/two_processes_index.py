"""Run by test_st_index.py on ranks: items by number, in the real trainer of two processes."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from negcache_sentence_transformers import NegativeCacheLoss
from sentence_transformers import SentenceTransformerTrainingArguments
from test_st_index import ITEMS, data_of
from tiny_items import Images, make_clip, make_images, texts_to
from tiny_transformer import make_trainer, weights

ROUTES = {"anchor": "query", "positive": "document", "negative": "document"}


def every(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def run(folder, make, name, resume=None, **options):
    """Train; return the loss, and what has to be the same again."""
    model, items = make(), make_images(ITEMS)
    data = data_of(items, options.pop("columns", 1))
    loss = NegativeCacheLoss(
        model,
        32,
        features="index",
        items=data["positive"],
        mini_batch_size=options.pop("mini_batch_size", None),
        generator=3 + dist.get_rank(),
    )
    trainer = make_trainer(folder / name, model, loss, data, max_steps=8, **options)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.evaluate()["eval_loss"] > 0
    told = [row for row in trainer.state.log_history if "loss" in row]
    one, other = every(weights(model))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    cache = loss.handler.cache
    shards = every(set(cache.data["number"][cache.age < 100].tolist()))
    assert all(shards)
    assert not shards[0] & shards[1]
    return told, {**weights(model), **weights(loss.handler)}


def train(folder):
    # Once the processes are joined, transformers saves in the first one alone.
    clip = make_clip(folder / os.environ["RANK"])
    start = weights(clip)
    SentenceTransformerTrainingArguments(str(folder), use_cpu=True)  # joins the processes

    def again():
        clip.load_state_dict(start)
        return clip

    def images():
        return texts_to(Images(192))

    for name, make, options in (
        ("clip", again, {}),
        ("small batches", again, {"mini_batch_size": 3}),
        ("routes", images, {"router_mapping": ROUTES, "columns": 2}),
        ("all used", images, {"router_mapping": ROUTES, "ddp_find_unused_parameters": False}),
    ):
        told, _ = run(folder, make, name, learning_rate=0.0, **options)
        assert max(row["cache_staleness"] for row in told) < 1e-10, name
        assert min(row["grad_norm"] for row in told) > 0, name
    save = {"save_strategy": "steps", "save_steps": 4}
    _, whole = run(folder, again, "whole", **save)
    _, resumed = run(folder, again, "again", str(folder / "whole" / "checkpoint-4"), **save)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def main():
    train(Path(sys.argv[1]))  # what wraps the model goes before the group that it talks through
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

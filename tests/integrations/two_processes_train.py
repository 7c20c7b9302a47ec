"""Run by test_sentence_transformers.py on ranks: a training on two processes, and again."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from negcache_sentence_transformers import NegativeCacheLoss
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_transformer import BATCH, make_model, make_pairs, make_trainer, weights


def run(folder, model, data, resume=None):
    loss = NegativeCacheLoss(model, 16, generator=dist.get_rank())
    trainer = make_trainer(
        folder / "out", model, loss, data, max_steps=4, save_strategy="steps", save_steps=2
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {**weights(model), **weights(loss.handler)}


def main():
    folder = Path(sys.argv[1])
    # Once the processes are joined, transformers saves in the first one alone.
    plain, first, second = (make_model(folder / os.environ["RANK"]) for _ in range(3))
    SentenceTransformerTrainingArguments(str(folder), use_cpu=True)  # joins the processes
    data = make_pairs(2 * BATCH)  # one step of both processes sees all of it
    trainer, whole = run(folder, first, data)

    batch = [plain.preprocess(data[name]) for name in ("anchor", "positive")]
    ranking = MultipleNegativesRankingLoss(plain)(batch, None)
    ranking.backward()
    norm = torch.nn.utils.get_total_norm(
        [each.grad for each in plain.parameters() if each.grad is not None]
    )
    one, two = trainer.state.log_history[:2]
    torch.testing.assert_close(one["loss"], ranking.item(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["grad_norm"], norm.item(), rtol=1e-4, atol=1e-6)
    assert two["cache_fill"] == 0.5, two  # of 16 slots on both
    assert two["cache_staleness"] > 0, two

    _, again = run(folder, second, data, str(folder / "out" / "checkpoint-2"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    for value in weights(trainer.model).values():
        copies = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(copies, value)
        torch.testing.assert_close(*copies, rtol=0, atol=0)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

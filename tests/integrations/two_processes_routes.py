"""Run by test_st_rows.py on ranks: each process has texts of another route."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformerTrainingArguments
from test_st_rows import TOKENS, make_texts, own, routed
from torch.nn.parallel import DistributedDataParallel


def train(folder):
    rank = int(os.environ["RANK"])
    # Once the processes are joined, transformers saves in the first one alone.
    model = routed(folder / str(rank), prompt=False)
    SentenceTransformerTrainingArguments(str(folder), use_cpu=True)  # joins the processes
    for name, weights in model.named_parameters():
        weights.requires_grad_(".pooler." not in name)  # no text goes through it
    loss = own(model, num_samples=2, max_length=TOKENS)
    loss.model = DistributedDataParallel(model)  # as the trainer does
    texts = make_texts(96)[rank::2]
    for step in range(6):
        part = texts[8 * step :][:8]
        task, prompt = ("query", None) if (rank + step) % 2 else ("document", "w1 ")
        batch = [
            model.preprocess(part[:4], task=task, prompt=prompt),
            model.preprocess(part[4:], task=task, prompt=prompt),
        ]
        value = loss(batch)
        model.zero_grad()
        value.backward()
        assert torch.isfinite(value)
        assert loss.metrics["staleness"] < 1e-10, (step, loss.metrics["staleness"])
    for weights in model.parameters():
        if weights.grad is not None:
            copies = [torch.empty_like(weights.grad) for _ in range(2)]
            dist.all_gather(copies, weights.grad)
            torch.testing.assert_close(*copies, rtol=0, atol=0)


def main():
    train(Path(sys.argv[1]))  # what wraps the model goes before the group that it talks through
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

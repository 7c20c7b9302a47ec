"""A small BERT for docstring search, whose forward pass is one step of the cache.

Batches are dicts, as usual in transformers: query_input_ids, query_attention_mask, and the same for
items. The weights start random: nothing is downloaded.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import negcache_torch as negcache
import numpy as np
import torch
from curves import Panel, draw
from docstring_model import mrr_and_recall, ranks
from docstring_pairs import BUCKETS, PADDING, QUERY_WORDS, Data
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel

ITEM_TOKENS = 48  # of 128: the name and the first lines say most
LEARNING_RATE = 1e-3


class DualEncoder(nn.Module):
    """One encoder for queries and items, and the loss.

    width:      of the embeddings
    slots:      of the cache
    replicated: whether several processes keep equal caches; a checkpoint holds one of them
    """

    def __init__(self, width: int, slots: int, *, replicated: bool = False) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=BUCKETS,
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=2 * width,
            max_position_embeddings=max(QUERY_WORDS, ITEM_TOKENS),
            pad_token_id=PADDING,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        tokens = negcache.FieldSpec((ITEM_TOKENS,), torch.int32)
        mask = negcache.FieldSpec((ITEM_TOKENS,), torch.bool)
        self.loss_fn = negcache.NegativeCacheLoss(
            slots,
            features={"input_ids": tokens, "attention_mask": mask},
            embedding=width,
            scale=20.0,
            labels={"id": negcache.FieldSpec((), torch.int64)},
            id_keys=("id",),
            use_cross_replica=replicated,
            generator=0,
        )

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Map input_ids and attention_mask (n, tokens) to unit embeddings (n, width)."""
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return functional.normalize((states * mask).sum(dim=1), dim=1)

    # The Trainer drops columns of a batch that are not arguments here.
    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        item_input_ids: Tensor,
        item_attention_mask: Tensor,
        item_id: Tensor,
    ) -> dict[str, Tensor]:
        """Return the loss and the query embeddings; in training, this is one step of the cache."""
        query = {"input_ids": query_input_ids, "attention_mask": query_attention_mask}
        item = {"input_ids": item_input_ids, "attention_mask": item_attention_mask}
        embeddings = self.embed(query)
        loss = self.loss_fn(self.embed, embeddings, self.embed(item), item, labels={"id": item_id})
        return {"loss": loss, "query_embeddings": embeddings.detach()}


class Pairs(Dataset[dict[str, Any]]):
    """The pairs of the given rows, as dicts of arrays for transformers' collator."""

    def __init__(self, data: Data, rows: np.ndarray) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        item = self.data.item_of[row]
        query, code = self.data.queries[row], self.data.items[item, :ITEM_TOKENS]
        return {
            "query_input_ids": query,
            "query_attention_mask": query != PADDING,
            "item_input_ids": code,
            "item_attention_mask": code != PADDING,
            "item_id": int(item),
        }


@torch.no_grad()
def search_metrics(
    model: DualEncoder, data: Data, queries: Tensor, item_ids: Tensor
) -> dict[str, float]:
    """Return MRR and recall@10 of the embedded queries, among all items."""
    tokens = torch.from_numpy(data.items[:, :ITEM_TOKENS]).to(queries.device)
    parts = tokens.split(256)
    items = torch.cat(
        [model.embed({"input_ids": part, "attention_mask": part != PADDING}) for part in parts]
    )
    found = ranks(queries, items, item_ids[:, None])
    return dict(zip(("mrr", "recall_at_10"), mrr_and_recall(found), strict=True))


def report(data: Data, history: list[dict[str, float]], path: Path) -> None:
    """Print the first and last evaluation, and plot what was logged by step."""
    first, *_, last = [row for row in history if "eval_mrr" in row]
    print(f"{len(data.held_out)} held-out queries among {len(data.items):,} items:")
    for row in (first, last):
        figures = "MRR {eval_mrr:.3f}, recall@10 {eval_recall_at_10:.3f}".format(**row)
        print(f"step {row['step']}: {figures}")
    titles = {"eval_mrr": "MRR", "eval_recall_at_10": "recall@10"}
    quality = {title: _points(history, key) for key, title in titles.items()}
    panels = [
        Panel("held-out queries, among all items", quality),
        Panel("staleness of drawn rows", {"": _points(history, "cache/staleness")}),
        Panel("effective negatives", {"": _points(history, "cache/effective_negatives")}),
    ]
    draw(panels, path)
    print(f"plot saved to {path}")


def _points(history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a value was logged, and the values."""
    found = [(row["step"], row[key]) for row in history if key in row]
    return [step for step, _ in found], [value for _, value in found]


def parse(description: str, out: Path, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of either program."""
    parser = argparse.ArgumentParser(description=description.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs per process")
    parser.add_argument("--cache-size", type=int, default=2_048)
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--max-pairs", type=int, default=4_000, help="stop mining after this many")
    parser.add_argument("--eval-every", type=int, default=100, help="steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to resume from")
    parser.add_argument("--out", type=Path, default=out, help="for checkpoints")
    parser.add_argument("--picture", type=Path, help="default: curves.svg in --out")
    options = parser.parse_args(arguments)
    options.picture = options.picture or options.out / "curves.svg"
    return options

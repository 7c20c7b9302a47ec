"""Train a sentence-transformers model to find Python functions by what they do.

    python examples/sentence_transformers_search.py --query "parse an ISO date"
    python examples/sentence_transformers_search.py --model all-MiniLM-L6-v2 --steps 500

Pairs (a docstring's first sentence, the function's source) are mined from installed packages, and
a tenth of them held out. Without --model it trains a StaticEmbedding from nothing: a vector for
each token, of a vocabulary that is made here from the same source. Nothing is downloaded then.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from curves import Panel, draw
from datasets import Dataset
from docstring_pairs import Pair, is_held_out, mine_pairs
from negcache_sentence_transformers import NegativeCacheLoss, keep_cache
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import semantic_search
from tokenizers import BertWordPieceTokenizer

OUT = Path(__file__).resolve().parents[1] / "runs" / "sentence_transformers_search"
TOKENS = 256  # of a text; longer ones are cut


def make_model(pairs: Sequence[Pair]) -> SentenceTransformer:
    """Return a model of one vector per token, still random."""
    tokenizer = BertWordPieceTokenizer()
    texts = [text for pair in pairs for text in (pair.query, pair.code)]
    tokenizer.train_from_iterator(texts, vocab_size=16_384, show_progress=False)
    tokenizer.enable_truncation(TOKENS)
    inner = tokenizer._tokenizer  # noqa: SLF001 - the wrapped one is what StaticEmbedding takes
    static = StaticEmbedding(inner, embedding_dim=256)
    return SentenceTransformer(modules=[static], device="cpu")


def evaluate(model: SentenceTransformer, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return how well each query finds its function among those of all pairs."""
    names = [str(row) for row in range(len(pairs))]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(names, (pair.query for pair in pairs), strict=True)),
        dict(zip(names, (pair.code for pair in pairs), strict=True)),
        {name: {name} for name in names},
        write_csv=False,
    )
    found = evaluator(model)
    return {name: found[f"cosine_{name}"] for name in ("ndcg@10", "mrr@10", "accuracy@1")}


def as_dataset(pairs: Sequence[Pair]) -> Dataset:
    """Return the columns that ranking losses take."""
    return Dataset.from_dict(
        {"anchor": [pair.query for pair in pairs], "positive": [pair.code for pair in pairs]}
    )


def train(model: SentenceTransformer, pairs: Sequence[Pair], options: argparse.Namespace) -> None:
    """Train with the trainer, as with any of its losses; two lines concern the cache."""
    arguments = SentenceTransformerTrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate or (2e-5 if options.model else 1e-2),
        logging_steps=max(1, options.steps // 10),
        save_steps=options.steps,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    length = None if options.model else TOKENS
    loss = NegativeCacheLoss(model, options.cache_size, max_length=length)
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=as_dataset(pairs), loss=loss
    )
    keep_cache(trainer)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    steps = [log["step"] for log in logged]
    shown = {"loss against the cache": "loss", "staleness of drawn rows": "cache_staleness"}
    draw(
        [
            Panel(title, {key: (steps, [log[key] for log in logged])})
            for title, key in shown.items()
        ],
        options.out / "training.svg",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Mine, train, evaluate before and after, and answer a query."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="a SentenceTransformer to tune: a folder, or a name")
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache-size", type=int, default=8_192)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--max-pairs", type=int, help="mine at most this many pairs")
    parser.add_argument("--query", default="parse an ISO date")
    parser.add_argument("--out", type=Path, default=OUT, help="for checkpoints, a picture")
    options = parser.parse_args(arguments)

    pairs = mine_pairs(options.max_pairs)
    training = [pair for pair in pairs if not is_held_out(pair.query)]
    held_out = [pair for pair in pairs if is_held_out(pair.query)]
    torch.manual_seed(0)
    model = SentenceTransformer(options.model) if options.model else make_model(training)
    before = evaluate(model, held_out)["ndcg@10"]
    train(model, training, options)
    after = evaluate(model, held_out)["ndcg@10"]
    print(f"nDCG@10 of {len(held_out)} held-out queries: {before:.3f}, then {after:.3f}")

    functions = model.encode([pair.code for pair in pairs], convert_to_tensor=True)
    query = model.encode([options.query], convert_to_tensor=True)
    print(options.query)
    for found in semantic_search(query, functions, top_k=3)[0]:
        pair = pairs[found["corpus_id"]]
        print(f"{found['score']:6.3f}  {pair.name}  ({pair.where})")


if __name__ == "__main__":
    main()

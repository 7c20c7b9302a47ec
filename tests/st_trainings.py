"""What tests of the sentence-transformers trainer share: data, checkpoints, what was said."""

import warnings

import negcache_torch as negcache
import torch
import torch.distributed.checkpoint as dcp
from datasets import Dataset, DatasetDict
from tiny_transformer import BATCH, make_pairs, make_texts

SAVE = {"save_strategy": "steps", "save_steps": 2}


def two_data_sets(size):
    """Pairs and triplets, which have some positives in common."""
    texts = make_texts(3 * size, seed=1)
    pairs = make_pairs(size)
    columns = [texts[first::3] for first in range(3)]
    columns[1][:BATCH] = pairs["positive"][:BATCH]
    named = dict(zip(("anchor", "positive", "negative"), columns, strict=True))
    return DatasetDict(pairs=pairs, triplets=Dataset.from_dict(named))


def told(trainer):
    """What a trainer logged, without what clocks say."""
    return [
        {key: value for key, value in row.items() if "runtime" not in key and "per_sec" not in key}
        for row in trainer.state.log_history
    ]


def warned(caplog):
    """What our own loggers said."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("negcache")]


def written(loss):
    return int((loss.handler.cache.age != negcache.EMPTY).sum())


def checkpoint_of(folder, step=2):
    return folder / f"checkpoint-{step}"


def saved(checkpoint):
    (folder,) = checkpoint.glob("negcache-*")
    return folder


def dcp_tables(folder):
    tables = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in tables.items()
    }
    exchange(dcp.load, state, folder)
    return state


def exchange(verb, state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        verb(state, checkpoint_id=folder)

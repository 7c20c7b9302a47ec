"""What a training with a text cache should give, step by step, with dicts and plain sums."""

import torch
from torch import nn


class Recorder:
    """The batches that a loss is trained on: of each the data set, and columns of (text, vector).

    For a model that does not learn: vectors are those of any step.
    """

    def __init__(self, loss):
        self.batches = []
        loss.register_forward_pre_hook(self._note)

    def _note(self, loss, arguments):
        if torch.is_grad_enabled():
            self.batches.append((loss.dataset_name, [_texts(loss, each) for each in arguments[0]]))


def _texts(loss, features):
    with torch.no_grad():
        rows = loss.model(dict(features))["sentence_embedding"]
    live = features["attention_mask"].bool()
    texts = [
        tuple(row[kept].tolist()) for row, kept in zip(features["input_ids"], live, strict=True)
    ]
    return list(zip(texts, nn.functional.normalize(rows, dim=1).double(), strict=True))


def expected_losses(steps, scale=20.0, grouped=False):
    """Return each step's loss: mean cross-entropy against what may oppose each anchor.

    steps: of each the batches of all processes, as a Recorder has them
    """
    cache, found = {}, []
    for batches in steps:
        positives = [
            (name if grouped else None, *item) for name, columns in batches for item in columns[1]
        ]
        found.append(
            torch.stack(
                [
                    _cross_entropy(name if grouped else None, row, positives, cache, scale)
                    for name, columns in batches
                    for row in zip(*columns, strict=True)
                ]
            )
            .mean()
            .item()
        )
        for name, columns in batches:
            for column in columns[1:]:
                cache.update({(name if grouped else None, text): row for text, row in column})
    return found


def _cross_entropy(group, row, positives, cache, scale):
    (_, anchor), (positive, target), *negatives = row
    own = {positive, *(text for text, _ in negatives)}
    items = [target, *(item for text, item in negatives if text != positive)]
    items += [item for other, text, item in positives if other == group and text not in own]
    items += [item for (other, text), item in cache.items() if other == group and text not in own]
    scores = scale * torch.stack(items) @ anchor
    return torch.logsumexp(scores, 0) - scores[0]

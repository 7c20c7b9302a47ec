"""A task: queries, items, and which item answers which query."""

from typing import NamedTuple

import numpy as np


class Questions(NamedTuple):
    """Queries to evaluate with.

    rows:    (q,) rows of the task's queries
    answers: (q, most) rows of all right items; short lists repeat one
    """

    rows: np.ndarray
    answers: np.ndarray


class Task(NamedTuple):
    """Token numbers of all queries (n, words) and of all items (m, words), int32, 0 = padding.

    item_of:          (n,) the row of each query's item
    train:            (k,) the rows of the queries to train on
    validation, test: the queries to choose by, and the queries to report
    query_buckets, item_buckets: the size of each side's table; token numbers are below it
    """

    queries: np.ndarray
    items: np.ndarray
    item_of: np.ndarray
    train: np.ndarray
    validation: Questions
    test: Questions
    query_buckets: int
    item_buckets: int

    def trained_items(self) -> np.ndarray:
        """Return the rows of the items that are trained on."""
        return np.unique(self.item_of[self.train])

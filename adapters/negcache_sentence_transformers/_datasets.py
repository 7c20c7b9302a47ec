"""Several data sets in one training: their numbers, and steps of one data set in all processes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from negcache_torch import OptionError
from sentence_transformers.base.sampler import SetEpochMixin
from torch.utils.data import BatchSampler

DATASET = "dataset"  # the field with the number of a row's data set


def dataset_number(name: str) -> int:
    """Return an int64 that depends only on a name: the same in all processes, whatever the others.

    >>> dataset_number("questions")
    -2963637457959367011
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def number_of_batch(name: str | None) -> int:
    """Return the number of the data set that a batch names; raise OptionError if it names none."""
    if name is None:
        raise OptionError(
            "the loss has group_by_dataset=True, but the batch does not say which data set it "
            "is from: give the trainer a DatasetDict before keep_cache(trainer), for evaluation "
            "too; in your own training loop set loss.dataset_name."
        )
    return dataset_number(name)


class _Groups(SetEpochMixin, BatchSampler):
    """The batches of one data set, `count` at a time, concatenated."""

    def __init__(self, batches: BatchSampler, count: int) -> None:
        super().__init__(batches.sampler, batches.batch_size, batches.drop_last)
        self.batches, self.count = batches, count

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        groups = zip(*[iter(self.batches)] * self.count, strict=False)  # the remainder is left out
        yield from (list(chain.from_iterable(group)) for group in groups)

    def __len__(self) -> int:
        return len(self.batches) // self.count


class SameDataset(SetEpochMixin, BatchSampler):
    """Batches in an order in which each step, one batch per process, uses one data set.

    Processes take turns in what a sampler yields. The last batches of a data set are left out if
    they do not suffice for all processes.
    """

    def __init__(
        self,
        choose: Callable[..., BatchSampler],
        count: int,
        dataset: Any,
        batch_samplers: Sequence[BatchSampler],
        **options: Any,
    ) -> None:
        """Put groups of `count` batches in the order that `choose` gives to batches.

        Raises OptionError for a data set with fewer batches than processes: it would never be used.
        """
        few = [place for place, each in enumerate(batch_samplers) if len(each) < count]
        if few:
            rows = [len(each) for each in dataset.datasets]
            raise OptionError(
                f"the data sets have {rows} rows, and number {few[0]} makes only "
                f"{len(batch_samplers[few[0]])} batches: with a dict of losses all {count} "
                "processes use the same data set in a step, each with its own batch. Lower "
                "per_device_train_batch_size, or leave out this data set."
            )
        grouped = [_Groups(each, count) for each in batch_samplers]
        self.groups = choose(dataset=dataset, batch_samplers=grouped, **options)
        super().__init__(dataset, grouped[0].batch_size, grouped[0].drop_last)
        self.count = count

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in that epoch."""
        super().set_epoch(epoch)
        if hasattr(self.groups, "set_epoch"):
            self.groups.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for group in self.groups:
            for part in range(self.count):  # as equal as possible if a batch was not full
                yield group[_cut(part, group, self.count) : _cut(part + 1, group, self.count)]

    def __len__(self) -> int:
        return len(self.groups) * self.count


def _cut(part: int, group: Sequence[int], count: int) -> int:
    return -(-part * len(group) // count)

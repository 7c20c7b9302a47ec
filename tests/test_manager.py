"""The manager against a plain dict of rows, by a state machine on every backend."""

import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from negcache_core import EMPTY, CacheManager, CapacityError, FieldSpec
from negcache_core.plans import grow_older, plan_insert
from negcache_core.state import OLDEST, NegativeCache

FIELDS = ("vector", "scalar")


def rows_of(numbers):
    """Return one distinct row of each field for each number."""
    numbers = np.asarray(numbers, np.int64).reshape(-1)
    return {
        "vector": np.stack([numbers, -numbers], axis=1).astype(np.float32),
        "scalar": numbers,
    }


class DictCache:
    """The model: a dict of slot -> (numbers by field, age), with every rule spelled out."""

    def __init__(self, capacity, use_lru):
        self.capacity, self.use_lru = capacity, use_lru
        self.held = {slot: dict.fromkeys(FIELDS, 0) for slot in range(capacity)}
        self.age = {}  # only slots that hold a row

    def update(self, refresh, fields, new_items):
        young = set()
        for slot, number, keep in refresh:
            if keep and 0 <= slot < self.capacity:
                self.held[slot].update(dict.fromkeys(fields, number))
                if self.use_lru:
                    young.add(slot)

        def oldest_first(slot):
            if slot in young:
                return (1, slot)
            return (-float("inf") if slot not in self.age else -self.age[slot], slot)

        order = sorted(range(self.capacity), key=oldest_first)
        kept = [number for number, keep in new_items if keep]
        for slot, number in zip(order, kept, strict=False):
            self.held[slot] = dict.fromkeys(FIELDS, number)
            young.add(slot)
        self.age = {slot: age + 1 for slot, age in self.age.items()}
        self.age.update(dict.fromkeys(young, 0))


class ManagerMachine(RuleBasedStateMachine):
    backend = None  # set by the subclass of each backend

    @initialize(capacity=st.integers(1, 6), use_lru=st.booleans())
    def start(self, capacity, use_lru):
        module = self.backend.module
        specs = {
            "vector": module.FieldSpec((2,), "float32"),
            "scalar": module.FieldSpec((), "int64"),
        }
        self.manager = module.CacheManager(specs, capacity, use_lru)
        self.cache = self.manager.init_cache()
        self.model = DictCache(capacity, use_lru)
        self.counter = 0

    def numbers(self, count):
        self.counter += count
        return list(range(self.counter - count + 1, self.counter + 1))

    @rule(data=st.data())
    def update(self, data):
        capacity = self.model.capacity
        slots = data.draw(st.lists(st.integers(-1, capacity), max_size=5))
        fields = data.draw(st.sets(st.sampled_from(FIELDS)))
        keep = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        count = data.draw(st.integers(0, capacity))
        mask = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
        refreshed, added = self.numbers(len(slots)), self.numbers(count)

        native = self.backend.to_native
        arguments = {
            "new_items": self.backend.native(rows_of(added)),
            "new_items_mask": None if mask is None else native(np.asarray(mask, bool)),
            "updated_item_data": {
                key: native(value) for key, value in rows_of(refreshed).items() if key in fields
            },
            "updated_item_indices": native(np.asarray(slots, np.int64)),
            "updated_item_mask": native(np.asarray(keep, bool)),
        }
        before = self.backend.numpy(self.cache)
        after = self.manager.update_cache(self.cache, **arguments)
        for ours, theirs in zip(
            leaves(before), leaves(self.backend.numpy(self.cache)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs, err_msg="the input cache was changed")
        self.cache = after
        self.model.update(
            list(zip(slots, refreshed, keep, strict=True)),
            fields,
            list(zip(added, mask or [True] * count, strict=True)),
        )

    @rule(extra=st.integers(1, 3))
    def too_many_rows_are_refused(self, extra):
        rows = self.backend.native(rows_of(self.numbers(self.model.capacity + extra)))
        with pytest.raises(CapacityError, match="each step would overwrite itself"):
            self.manager.update_cache(self.cache, new_items=rows)

    @rule()
    def nothing_to_do_still_ages(self):
        self.cache = self.manager.update_cache(self.cache)
        self.model.update([], (), [])

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "model"):
            return
        ours = self.backend.numpy(self.cache)
        slots = range(self.model.capacity)
        for field in FIELDS:
            expected = rows_of([self.model.held[slot][field] for slot in slots])[field]
            np.testing.assert_array_equal(ours.data[field], expected)
        ages = [self.model.age.get(slot, EMPTY) for slot in slots]
        np.testing.assert_array_equal(ours.age, ages)
        assert ours.age.dtype == np.int32


def leaves(cache):
    return [*cache.data.values(), cache.age]


@pytest.mark.parametrize("name", [*EAGER, "jax"])
def test_manager_is_a_dict_of_rows(name):
    machine = type("Machine", (ManagerMachine,), {"backend": BACKENDS[name]})
    examples = 3 if name == "jax" else settings.default.max_examples
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=12)
    machine.TestCase().runTest()


def test_ages_never_reach_empty():
    age = np.asarray([OLDEST - 1, OLDEST, EMPTY, 0, -1], np.int32)
    older = grow_older(age)
    np.testing.assert_array_equal(older, [OLDEST, OLDEST, EMPTY, 1, 0])
    assert older.dtype == np.int32
    # A row as old as can be still goes after the empty slots, and before younger ones.
    np.testing.assert_array_equal(plan_insert(older, 3).slots, [2, 0, 1])


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow"])
def test_large_capacity_keeps_ties_in_order(name):
    """100,003 slots of two ages: a partial sort must still take the lowest slots first."""
    backend = EAGER[name]
    age = np.full(100_003, 7, np.int32)
    age[[5, 99_999, 40_000]] = 8
    plan = plan_insert(backend.to_native(age), 6, xp=backend.module.CacheManager.backend.xp)
    np.testing.assert_array_equal(backend.to_numpy(plan.slots), [5, 40_000, 99_999, 0, 1, 2])


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow"])
def test_rows_are_cast_as_the_field_says(name):
    backend = EAGER[name]
    module = backend.module
    manager = module.CacheManager(
        {"e": module.FieldSpec((1,), "float16"), "i": module.FieldSpec((), "int64")}, 2
    )
    cache = manager.update_cache(
        manager.init_cache(),
        new_items={
            "e": backend.to_native(np.asarray([[1 / 3]], np.float32)),
            "i": backend.to_native(np.asarray([3], np.int16)),
        },
    )
    np.testing.assert_array_equal(backend.to_numpy(cache.data["e"])[0], [np.float16(1 / 3)])
    assert int(backend.to_numpy(cache.data["i"])[0]) == 3


def test_capacity_is_that_of_the_cache_given():
    """One manager serves shards of other sizes; its own cache_size is what init_cache makes."""
    manager = CacheManager({"i": FieldSpec((), "int64")}, 2)
    cache = NegativeCache({"i": np.asarray([1, 2, 3])}, np.asarray([1, 5, 2], np.int32))
    cache = manager.update_cache(cache, new_items={"i": [9]})
    np.testing.assert_array_equal(cache.data["i"], [1, 9, 3])

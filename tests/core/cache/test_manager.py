"""The manager against a plain dict of rows, by a state machine on every backend."""

import numpy as np
import pytest
from backends import BACKENDS, EAGER
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from negcache_core import EMPTY, CacheManager, CapacityError, FieldSpec, KeysError
from negcache_core.cache.plans import grow_older, plan_insert
from negcache_core.cache.state import OLDEST, NegativeCache
from negcache_core.testing import DictCache

FIELDS = ("vector", "scalar")


def rows_of(numbers):
    """Return one distinct row of each field for each number."""
    numbers = np.asarray(list(numbers), np.int64).reshape(-1)
    return {
        "vector": np.stack([numbers, -numbers], axis=1).astype(np.float32),
        "scalar": numbers,
    }


def rows_of_items(items):
    return {field: rows_of([item[field] for item in items])[field] for field in FIELDS}


class ManagerMachine(RuleBasedStateMachine):
    backend = None  # set by the subclass of each backend

    @initialize(capacity=st.integers(1, 6), use_lru=st.booleans(), unique=st.booleans())
    def start(self, capacity, use_lru, unique):
        module = self.backend.module
        specs = {
            "vector": module.FieldSpec((2,), "float32"),
            "scalar": module.FieldSpec((), "int64"),
        }
        unique_key = "scalar" if unique else None
        self.manager = module.CacheManager(specs, capacity, use_lru, unique_key=unique_key)
        self.cache = self.manager.init_cache()
        zeros = dict.fromkeys(FIELDS, 0)
        self.model = DictCache(capacity, zeros, use_lru=use_lru, unique_key=unique_key)
        self.counter = 0

    def items(self, count, data):
        """Return new items: distinct, but for keys of so few values that they come again."""
        self.counter += count
        numbers = list(range(self.counter - count + 1, self.counter + 1))
        keys = numbers
        if self.model.unique_key:
            keys = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
        return [dict(zip(FIELDS, both, strict=True)) for both in zip(numbers, keys, strict=True)]

    @rule(data=st.data())
    def update(self, data):
        capacity = self.model.capacity
        slots = data.draw(st.lists(st.integers(-1, capacity), max_size=5))
        fields = data.draw(st.sets(st.sampled_from(FIELDS)))
        keep = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
        count = data.draw(st.integers(0, capacity))
        mask = data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count))
        refreshed, added = self.items(len(slots), data), self.items(count, data)

        native = self.backend.to_native
        arguments = {
            "new_items": self.backend.native(rows_of_items(added)),
            "new_items_mask": None if mask is None else native(np.asarray(mask, bool)),
            "updated_item_data": {
                key: native(value)
                for key, value in rows_of_items(refreshed).items()
                if key in fields
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
        refresh = [{field: item[field] for field in fields} for item in refreshed]
        self.model.update(
            zip(slots, refresh, keep, strict=True),
            zip(added, mask or [True] * count, strict=True),
        )

    @rule(extra=st.integers(1, 3))
    def too_many_rows_are_refused(self, extra):
        rows = self.backend.native(rows_of(range(self.model.capacity + extra)))
        with pytest.raises(CapacityError, match="each step would overwrite itself"):
            self.manager.update_cache(self.cache, new_items=rows)

    @rule()
    def nothing_to_do_still_ages(self):
        self.cache = self.manager.update_cache(self.cache)
        self.model.update()

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "model"):
            return
        ours = self.backend.numpy(self.cache)
        slots = range(self.model.capacity)
        for field in FIELDS:
            expected = rows_of([self.model.held[slot][field] for slot in slots])[field]
            np.testing.assert_array_equal(ours.data[field], expected)
        np.testing.assert_array_equal(ours.age, self.model.ages())
        assert ours.age.dtype == np.int32


def leaves(cache):
    return [*cache.data.values(), cache.age]


@pytest.mark.parametrize("name", [*EAGER, "jax"])
def test_manager_is_a_dict_of_rows(name):
    machine = type("Machine", (ManagerMachine,), {"backend": BACKENDS[name]})
    part = {"jax": 13, "tensorflow": 3, "array-api-strict": 3}.get(name, 1)  # the slow ones
    examples = settings.default.max_examples // part
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


def unique_manager(module, capacity, *, shape=(), dtype="int64", **options):
    specs = {"id": module.FieldSpec(shape, dtype), "value": module.FieldSpec((), "float32")}
    return module.CacheManager(specs, capacity, unique_key="id", **options)


def held_by(backend, cache):
    """Return slot -> (id, value, age) of the written slots."""
    cache = backend.numpy(cache)
    return {
        slot: (cache.data["id"][slot].tolist(), float(cache.data["value"][slot]), int(age))
        for slot, age in enumerate(cache.age)
        if age != EMPTY
    }


def insert(backend, manager, cache, ids, values, mask=None, dtype="int64", **refresh):
    items = {"id": np.asarray(ids, dtype), "value": np.asarray(values, np.float32)}
    return manager.update_cache(
        cache,
        new_items=backend.native(items),
        new_items_mask=None if mask is None else backend.to_native(np.asarray(mask)),
        **backend.native(refresh),
    )


ON_EAGER = pytest.mark.parametrize("backend", EAGER.values(), ids=lambda backend: backend.name)


@ON_EAGER
def test_an_item_keeps_its_one_slot(backend):
    manager = unique_manager(backend.module, 3)
    cache = insert(backend, manager, manager.init_cache(), [7, 8, 9], [1, 2, 3])
    # 8 is written where it is; 5 takes the oldest slot that no item of the batch owns.
    cache = insert(backend, manager, cache, [7, 5], [4, 5])
    assert held_by(backend, cache) == {0: (7, 4, 0), 1: (5, 5, 0), 2: (9, 3, 1)}
    cache = insert(backend, manager, cache, [9, 6, 7], [6, 7, 8])
    assert held_by(backend, cache) == {0: (7, 8, 0), 1: (6, 7, 0), 2: (9, 6, 0)}


@ON_EAGER
def test_of_equal_items_in_a_batch_the_last_unmasked_counts(backend):
    manager = unique_manager(backend.module, 4)
    cache = insert(
        backend,
        manager,
        manager.init_cache(),
        [5, 6, 5, 5],
        [1, 2, 3, 4],
        [True, True, True, False],
    )
    assert held_by(backend, cache) == {0: (6, 2, 0), 1: (5, 3, 0)}
    cache = insert(backend, manager, cache, [6, 6, 3], [5, 6, 7], [False, False, True])
    assert held_by(backend, cache) == {0: (6, 2, 1), 1: (5, 3, 1), 2: (3, 7, 0)}
    cache = insert(backend, manager, cache, [6, 6, 6], [8, 9, 10], [True, True, False])
    assert held_by(backend, cache) == {0: (6, 9, 0), 1: (5, 3, 2), 2: (3, 7, 1)}


@ON_EAGER
def test_the_zeros_of_an_empty_slot_are_no_item(backend):
    manager = unique_manager(backend.module, 3)
    cache = insert(backend, manager, manager.init_cache(), [4], [1])
    cache = insert(backend, manager, cache, [9, 0], [2, 3])
    assert held_by(backend, cache) == {0: (4, 1, 1), 1: (9, 2, 0), 2: (0, 3, 0)}


@ON_EAGER
@pytest.mark.parametrize("use_lru", [True, False])
def test_items_are_looked_for_after_the_refresh(backend, use_lru):
    manager = unique_manager(backend.module, 3, use_lru=use_lru)
    cache = insert(backend, manager, manager.init_cache(), [1, 2, 3], [1, 2, 3])
    cache = insert(backend, manager, cache, [3], [4])
    # The refresh writes 2's value, then 2 comes as a new item; 1 becomes 9 before 9 and 1 come.
    cache = insert(
        backend,
        manager,
        cache,
        [2, 9],
        [5, 6],
        updated_item_data={"id": np.asarray([9, 2]), "value": np.asarray([7.0, 8.0], np.float32)},
        updated_item_indices=np.asarray([0, 1]),
    )
    assert held_by(backend, cache) == {0: (9, 6, 0), 1: (2, 5, 0), 2: (3, 4, 1)}
    cache = insert(
        backend,
        manager,
        cache,
        [9],
        [9],
        updated_item_data={"id": np.asarray([8])},
        updated_item_indices=np.asarray([0]),
    )
    # 9 is gone, so it is a new item: over the oldest row, and not over the one just refreshed.
    assert held_by(backend, cache)[2] == (9, 9, 0)


@ON_EAGER
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_keys_of_any_rank_and_dtype(backend, dtype):
    """2,100 slots are two groups and a rest; one item is in the rest, one in two groups."""
    manager = unique_manager(backend.module, 2100, shape=(2, 1), dtype=dtype)
    ids = np.asarray([[[1], [1]], [[0], [1]], [[1], [0]]]).astype(dtype)
    age = np.full(2100, 5, np.int32)
    table = np.zeros((2100, 2, 1), dtype)
    table[[2098, 2099]] = ids[0]  # duplicates, loaded from elsewhere
    table[[1500, 100]] = ids[1]
    cache = backend.native(NegativeCache({"id": table, "value": np.zeros(2100, np.float32)}, age))
    cache = insert(backend, manager, cache, ids, [1, 2, 3], dtype=dtype)
    held = held_by(backend, cache)
    assert {slot: value for slot, (_, value, _) in held.items() if value} == {2098: 1, 100: 2, 0: 3}
    assert held[2099] == (ids[0].tolist(), 0, 6)


def test_a_row_without_a_value_is_every_row():
    manager = unique_manager(BACKENDS["numpy"].module, 3, shape=(0,))
    cache = insert(BACKENDS["numpy"], manager, manager.init_cache(), np.zeros((2, 0)), [1, 2])
    assert held_by(BACKENDS["numpy"], cache) == {0: ([], 2, 0)}


@ON_EAGER
def test_a_new_item_takes_a_slot_just_refreshed_before_one_that_an_item_owns(backend):
    manager = unique_manager(backend.module, 2)
    cache = insert(backend, manager, manager.init_cache(), [1, 2], [1, 2])
    cache = insert(
        backend,
        manager,
        cache,
        [1, 3],
        [3, 4],
        updated_item_data={"value": np.asarray([5.0], np.float32)},
        updated_item_indices=np.asarray([1]),
    )
    assert held_by(backend, cache) == {0: (1, 3, 0), 1: (3, 4, 0)}


@pytest.mark.parametrize("data", ["rows", None, [1], {"x": "rows"}])
def test_a_cache_that_is_none_prints_too(data):
    """Errors and debuggers print what was given."""
    assert repr(data) in repr(NegativeCache(data, np.zeros(2, np.int32)))
    assert "age=3" in repr(NegativeCache({}, 3))


@pytest.mark.parametrize("key", ["y", None, ["x"]])
def test_scales_of_a_field_that_does_not_exist_are_refused_in_words(key):
    with pytest.raises(KeysError, match=r"is not among the specs \['x'\]"):
        CacheManager({"x": FieldSpec((2,), "int8")}, 3).storing(key)

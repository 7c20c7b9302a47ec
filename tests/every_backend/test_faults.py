"""Faults: an exception raised anywhere in a step leaves the handler as if the step had not been."""

import itertools

import jax
import numpy as np
import pytest
from backends import BACKENDS
from fuzzing import method, state_of
from handled import batch_of, double, specs_of

from negcache_core import NegativeCache

PLACES = ["network", "scale", "score_transform", "reducer", "retrieval_fn", "filter"]


class FaultError(Exception):
    """What no part of the library raises or catches."""


class Fails:
    """A function that raises at its n-th call from when it is armed."""

    def __init__(self, function):
        self.function, self.left = function, None
        self.generator = getattr(function, "generator", None)

    def __call__(self, *arguments):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise FaultError
        return self.function(*arguments)


class Twin:
    """A handler of several caches each of whose functions can be made to fail."""

    def __init__(self, backend):
        self.backend, module = backend, backend.module
        xp = module.CacheManager.backend.xp
        choose = module.GumbelMaxRetrievalFn(**({} if backend.bind else {"generator": 2}))

        def passes(cache, new_items):
            return new_items["x"][:, 0] > 0.0

        functions = [double, lambda: 2.0, lambda scores: scores + 1.0, xp.mean, choose, passes]
        self.functions = dict(zip(PLACES, map(Fails, functions), strict=True))
        *loss, new_items_filter = PLACES[1:]
        loss = {name: self.functions[name] for name in loss}
        if backend.bind:
            loss["retrieval_fn"] = choose  # draws by the state's key: a copy is made of it
        made = module.MultiCacheLossHandler(
            {name: module.CacheManager(specs_of(module), 4) for name in "abc"},
            module.CacheClassificationLoss(
                "embedding", ("x",), **loss, **({} if backend.bind else {"generator": 1})
            ),
            embedding_key="embedding",
            data_keys=("x",),
            new_items_filter=self.functions[new_items_filter],
        )
        if backend.bind:
            made = made.bind(made.init(jax.random.key(0)))
        self.handler = made
        self.call("prefill", {name: {"x": batch_of(backend, 1, 3)[1]} for name in "abc"}, 2)

    def call(self, name, *arguments):
        network = self.functions["network"]
        if name != "update_cache_and_compute_loss":
            return method(self.handler, name)(network, *arguments)
        query, x = batch_of(self.backend, 5)
        new = {each: double({"x": x}) for each in "abc"}
        features = {each: {"x": x} for each in "abc"}
        return method(self.handler, name)(network, query, double({"x": x}), new, features)

    def state(self):
        return state_of((self.handler, self.functions["retrieval_fn"]))


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow", "jax"])
def test_a_fault_anywhere_leaves_every_cache_as_it_was(name):
    backend, raised = BACKENDS[name], set()
    faulty, sound = Twin(backend), Twin(backend)
    calls = [("update_cache_and_compute_loss",), ("refresh", 2)]
    for place, at, call in itertools.product(PLACES, (1, 3), calls):
        before, function = faulty.state(), faulty.functions[place]
        function.left = at
        try:
            ours = faulty.call(*call)
        except FaultError:
            raised.add((place, at, call[0]))
            assert faulty.state() == before, (place, at, call)
            ours = faulty.call(*call)
        function.left = None
        theirs = sound.call(*call)  # which knows of no fault
        np.testing.assert_array_equal(backend.to_numpy(ours), backend.to_numpy(theirs))
        assert faulty.state() == sound.state()
    step = calls[0][0]
    places = set(PLACES) - ({"retrieval_fn"} if backend.bind else set())
    assert raised >= {(place, 1, step) for place in places}
    # The last of three caches, after the others are planned and embedded.
    assert raised >= {("filter", 3, step), ("network", 3, "refresh")}


@pytest.mark.parametrize("name", ["numpy", "torch", "tensorflow"])  # JAX is given a key each time
@pytest.mark.parametrize("phase", ["network", "noise"])
def test_a_loss_by_itself_undoes_its_draws(name, phase):
    """Without a handler too: the next draw is the one that the failed call would have made."""
    backend = BACKENDS[name]
    module, rng = backend.module, np.random.default_rng(0)
    table = rng.normal(size=(64, 2))
    cache = backend.native(NegativeCache({"x": table, "embedding": table}, np.zeros(64, np.int32)))
    queries = backend.to_native(rng.normal(size=(5, 2)))

    def failing(*arguments):
        raise FaultError

    slots = []
    for fails in (False, True):
        loss = module.CacheClassificationLoss("embedding", ("x",), generator=3)
        if fails and phase == "network":
            with pytest.raises(FaultError):
                loss(failing, queries, queries, cache)
        if fails and phase == "noise":
            transform, loss.score_transform = loss.score_transform, failing
            with pytest.raises(FaultError):
                loss.retrieve(queries, cache)
            loss.score_transform = transform
        slots.append(backend.to_numpy(loss.retrieve(queries, cache).slots))
    np.testing.assert_array_equal(*slots)

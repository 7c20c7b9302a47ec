"""An adapter in a few lines passes the whole kit, and the kit catches what is wrong with one."""

from pathlib import Path
from types import SimpleNamespace

import array_api_strict
import numpy as np
import pytest
import toy
from torch_backend import TORCH

from negcache_core import FieldSpec, NegativeCache
from negcache_core.adapter import Caches, bind
from negcache_core.losses import estimators
from negcache_core.testing import CHECKS, Adapter, Threads


def adapter_of(bound):
    """Describe classes on the toy's arrays as the kit wants it."""
    adapter = Adapter(
        "toy",
        SimpleNamespace(FieldSpec=FieldSpec, **bound._asdict()),
        array_api_strict.asarray,
        np.asarray,
        replicas=lambda count, function: Threads.run(count, lambda rank: function(adapter, rank)),
        dtypes=tuple(dtype for dtype in Adapter._field_defaults["dtypes"] if dtype != "float16"),
    )
    return adapter


def test_the_toy_is_small():
    lines = Path(toy.__file__).read_text().splitlines()
    assert sum(bool(line) for line in lines) <= 60


@pytest.mark.parametrize("check", CHECKS)
def test_the_toy_passes_the_kit(check):
    CHECKS[check](adapter_of(toy.BOUND))


class Neighbour(toy.ToyBackend):
    def write_rows(self, table, slots, rows):
        return self.xp.put_rows(table, (slots + 1) % table.shape[0], rows)


class Forgetful(toy.ToyBackend):
    def remember(self, generator):
        return None


class Reseeded(toy.ToyBackend):
    def set_generator_state(self, generator, state):
        pass


class OneNoise(toy.ToyBackend):
    def uniform(self, generator, shape, like):
        return self.xp.asarray(np.random.default_rng(0).random(shape))


class Rounded(toy.ToyBackend):
    def to_host(self, array):
        host = np.asarray(array)
        return host.astype(np.float32).astype(host.dtype) if host.dtype.kind == "f" else host


class AgesStay(toy.ToyBackend):
    def overwrite(self, table, values):
        return table


class EmptyCount(toy.ToyBackend):
    def block_log_sum_exp(self, scores, written, block):
        return super().block_log_sum_exp(scores, written | ~written, block)


class FalseNegatives(toy.ToyBackend):
    def exclude(self, scores, rows, own):
        return scores


class LastTile(toy.ToyBackend):
    def fold_tiles(self, function, count):
        return super().fold_tiles(lambda tile: function(count - 1), count)


class Unwritten(toy.ToyStore):
    def write(self, caches):
        if not hasattr(self, "state"):
            super().write(caches)


class Ageing(toy.ToyStore):
    def read(self):
        caches = super().read()
        older = {name: NegativeCache(data, age + 1) for name, (data, age) in caches.items()}
        self.write(Caches(older))
        return caches


class Narrow(toy.ToyStore):
    def write(self, caches):
        first = getattr(self, "window", caches.window)
        super().write(Caches(caches, first))


class Reversed(toy.ToyReplicas):
    def gather(self, arrays, sizes):
        every = self.threads.exchange(arrays)[::-1]
        return [toy.TOY.xp.concat(list(parts)) for parts in zip(*every, strict=True)]


class AsTheyCome(toy.ToyReplicas):
    def serve(self, arrays, route):
        return [self.own(each, route.sizes) for each in self.gather(arrays, route.sizes)]


class Backwards(toy.ToyReplicas):
    def give_back(self, arrays, route):
        return [each[::-1, ...] for each in super().give_back(arrays, route)]


class Selfish(toy.ToyReplicas):
    def texts(self, own, like):
        return [own] * self.count


class Unshared(toy.ToyReplicas):
    def share_generator(self, generator, like):
        pass


def broken(part):
    """Return the toy's classes with one of its parts put in place of the right one."""
    backend, parts = toy.TOY, {"store": toy.ToyStore, "replicas": toy.ToyReplicas}
    if issubclass(part, toy.ToyBackend):
        backend = part(array_api_strict)
    elif issubclass(part, toy.ToyStore):
        parts["store"] = part
    else:
        parts["replicas"] = part
    return adapter_of(bind(backend, "toy", **parts))


@pytest.mark.parametrize(
    ("part", "check", "message"),
    [
        (Neighbour, "steps", "step 0/1/0/tokens"),
        (Neighbour, "prefill", "step 0/1/0/tokens"),
        (Neighbour, "refresh", "step 0/1/0/embedding"),
        (Forgetful, "rollback", "the draw after a step with a failing network"),
        (Reseeded, "files", "the draw after loading"),
        (OneNoise, "files", "draws the same twice"),
        (Rounded, "files", "a file of NumPy"),
        (AgesStay, "steps", "step 0/1/1"),
        (EmptyCount, "estimators", "the expected gradient of paper, fresh"),
        (FalseNegatives, "loss", "at /0/0/tokens"),
        (LastTile, "loss", "at /0/0/tokens"),
        (Unwritten, "steps", "step 0/1/0/tokens"),
        (Narrow, "drift", "step 1"),
        (Ageing, "rollback", "the cache after a step with a failing network"),
        (Reversed, "replicas", "replica 0/gather"),
        (AsTheyCome, "replicas", "replica 0/serve"),
        (Backwards, "replicas", "replica 0/give_back"),
        (Backwards, "shards", "step 1"),
        (Selfish, "replicas", "was expected to raise"),
        (Unshared, "replicas", "replica 1/noise"),
    ],
)
def test_a_planted_fault_is_caught(part, check, message):
    with pytest.raises(AssertionError, match=message):
        CHECKS[check](broken(part))


def test_a_biased_estimator_is_caught(monkeypatch):
    """Nothing names the estimators to the kit."""

    def biased(softmax, *, xp):
        weights = estimators.paper(softmax, xp=xp)
        return weights._replace(own=0.9 * weights.own)

    monkeypatch.setitem(estimators.ESTIMATORS, "biased", estimators.Estimator(biased))
    with pytest.raises(AssertionError, match="gradient of biased, fresh"):
        CHECKS["estimators"](adapter_of(toy.BOUND))


def test_a_gradient_through_the_weights_is_caught(monkeypatch):
    backend = TORCH.module.CacheManager.backend
    monkeypatch.setattr(type(backend), "stop_gradient", lambda self, array: array)
    with pytest.raises(AssertionError, match="the expected gradient of paper"):
        CHECKS["estimators"](TORCH)

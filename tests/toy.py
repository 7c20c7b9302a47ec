"""A whole adapter: array-api-strict, as if its arrays could not be written to."""

import array_api_strict

from negcache_core import NegativeCache
from negcache_core.adapter import Backend, Caches, Replicas, Store, bind
from negcache_core.testing import Threads


class ToyBackend(Backend):
    name = "toy"

    def write_rows(self, table, slots, rows):
        return self.xp.put_rows(table, slots, rows)  # the new table

    def overwrite(self, table, values):
        return values


class ToyStore(Store):
    def __init__(self, setup):
        self.write(setup.init_caches())

    def read(self):
        caches = {name: NegativeCache(*cache) for name, cache in self.state.items()}
        return Caches(caches, self.window)

    def write(self, caches):
        self.state = {name: (dict(data), age) for name, (data, age) in caches.items()}
        self.window = caches.window


class ToyReplicas(Replicas):
    def __init__(self, group):
        self.threads = group or Threads()
        self.rank, self.count = self.threads.rank, self.threads.count

    def numbers(self, own, like):
        return self.threads.exchange(tuple(own))

    def texts(self, own, like):
        return self.threads.exchange(own)

    def share_generator(self, generator, like):
        state = self.threads.exchange(TOY.generator_state(generator)[1])[0]
        TOY.set_generator_state(generator, state)

    def gather(self, arrays, sizes):
        every = self.threads.exchange(arrays)
        return [TOY.xp.concat(list(parts)) for parts in zip(*every, strict=True)]

    def gather_fresh(self, array, sizes):
        return self.gather([array], sizes)[0]

    def parts(self, array, sizes):
        return TOY.xp.stack([self.own(each, sizes) for each in self.threads.exchange(array)])

    def serve(self, arrays, route):
        entries, *rows = self.gather([route.entries, *arrays], route.sizes)
        order = TOY.xp.argsort(entries)
        return [self.own(TOY.xp.take_rows(each, order), route.sizes) for each in rows]

    def give_back(self, arrays, route):
        every = self.gather(arrays, route.sizes)
        return [TOY.xp.take_rows(each, route.entries) for each in every]

    def entries(self, owner):
        return TOY.xp.nonzero(owner == self.rank)[0]


TOY = ToyBackend(array_api_strict)
BOUND = bind(TOY, "toy", store=ToyStore, replicas=ToyReplicas)

"""What the fuzz test calls: the public entries of a package, each with arguments that work."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from negcache_jax._backend import KeyStream

import negcache_core
from negcache_core import EMPTY, NegativeCache

B, C, D = 2, 4, 2  # queries, slots, width
FIELDS = {"x": (D,), "id": (), "log_q": (), "embedding": (D,)}
LOSSES = {
    "paper": {"num_samples": 2},
    "shared": {"estimator": "shared", "in_batch_negatives": True, "id_key": "id"},
    "exact_query": {
        "estimator": "exact_query",
        "log_frequency_key": "log_q",
        "group_key": "id",
        "margin": 0.5,
        "scale": 2.0,
    },
}
LOSS_OPTIONS = {
    "embedding_key": "embedding",
    "data_keys": ("x",),
    "top_k": 2,
    "scale": 2.0,
    "estimator": "paper",
    "num_samples": 1,
    "in_batch_negatives": False,
    "staleness_correction": False,
    **dict.fromkeys(("score_transform", "reducer", "retrieval_fn", "id_key")),
    **dict.fromkeys(("id_keys", "group_key", "margin", "max_staleness")),
    **dict.fromkeys(("log_frequency_key", "generator", "tile_bytes")),
}
HANDLER_OPTIONS = {
    "embedding_key": "embedding",
    "data_keys": ("x",),
    "use_cross_replica": False,
    "new_items_filter": None,
    "group": None,
}
SIZES = {
    "cache_size": 100,
    "width": 4,
    "batch_size": 4,
    "feature_bytes": 8,
    "world_size": 2,
    "dtype": "float32",
    "tower_dtype": "float32",
    "num_samples": 1,
    "estimator": "shared",
    "in_batch_negatives": True,
    "top_k": None,
    "id_bytes": 8,
    "id_fields": 1,
    "positives": 1,
    "group_bytes": 0,
    "margin": False,
    "log_frequency_bytes": 0,
    "stored_bytes": None,
    "tile_bytes": 2**20,
    "draws_elsewhere": None,
}


class Entry(NamedTuple):
    """A public entry: call(**arguments), and what it must leave alone where it raises."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    held: Any = ()


def tower(features):
    return features["x"] * 2.0


def first_of(rows):
    """Return the first array of a structure."""
    while isinstance(rows, (dict, list, tuple)) and rows:
        rows = next(iter(rows.values() if isinstance(rows, dict) else rows))
    return rows


def method(handler, name):
    """Return a method as the core has it: on a JAX handler that is bound to its state, too."""
    owner = next(
        cls
        for cls in type(handler).__mro__
        if cls.__module__.startswith("negcache_core") and name in vars(cls)
    )
    return vars(owner)[name].__get__(handler)


def state_of(held):
    """Return all that must stay as it is, as comparable bytes."""
    if isinstance(held, tuple) and not hasattr(held, "_fields"):
        return [state_of(each) for each in held]
    if hasattr(held, "_caches"):
        return [state_of(each) for each in held._caches().values()] + [state_of(held.cache_loss)]
    if hasattr(held, "age"):
        return {key: _bytes(table) for key, table in (*held.data.items(), ("age", held.age))}
    generator = getattr(held, "generator", None)
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, KeyStream):
        return _bytes(jax.random.key_data(generator.key))
    state = getattr(generator, "state", None)
    return None if state is None else _bytes(state)


def _bytes(array):
    if isinstance(array, torch.Tensor):
        array = array.detach()
    array = np.asarray(array)
    return array.dtype.str, array.shape, array.tobytes()


class Entries:
    """Makes the entries of one package, by name."""

    def __init__(self, backend, folder):
        self.folder = folder
        self.backend, self.module, self.native = backend, backend.module, backend.native
        self.rng = np.random.default_rng(0)
        self.makers = {
            "CacheManager": self.manager_entry,
            "update_cache": self.update_entry,
            "CacheClassificationLoss": lambda: Entry(
                self.module.CacheClassificationLoss, LOSS_OPTIONS
            ),
            "functions of a loss": self.functions_of_a_loss,
            "functions of a step": self.functions_of_a_step,
            "CacheLossHandler": lambda: Entry(
                self.module.CacheLossHandler,
                {"cache_manager": self.manager(), "cache_loss": self.loss(), **HANDLER_OPTIONS},
            ),
            "MultiCacheLossHandler": lambda: Entry(
                self.module.MultiCacheLossHandler,
                {
                    "cache_managers": {"a": self.manager(), "b": self.manager()},
                    "cache_loss": self.loss(),
                    **HANDLER_OPTIONS,
                },
            ),
            "IsInCacheFilterFn": self.filter_entry,
            "MaxScoreRetrievalFn": lambda: Entry(
                self.module.MaxScoreRetrievalFn(), {"scores": self.array(B, C)}
            ),
            "GumbelMaxRetrievalFn": self.gumbel_entry,
            "approximate_top_k_with_indices": lambda: Entry(
                self.module.approximate_top_k_with_indices,
                {"scores": self.array(B, C), "k": 2, **self.namespace()},
            ),
            "in_chunks": lambda: Entry(
                self.call_in_chunks, {"network": first_of, "size": 1, "rows": self.rows(B)}
            ),
            "scaling": lambda: Entry(lambda **given: str(self.module.scaling(**given)), SIZES),
            "commit": self.commit_entry,
        }
        for kind in LOSSES:
            self._add("loss", kind, self.loss_entry)
            self._add("retrieve", kind, self.retrieve_entry)
            self._add("loss_from_negatives", kind, self.phase_two_entry)
            self._add("step", kind, self.step_entry)
        upkeep = ("refresh", "prefill", "load", "restore", "plot_cache")
        for name in ("update_cache_and_compute_loss", "retrieve", *upkeep):
            self._add("several caches", name, self.several_entry)
        for name in (*upkeep, "save"):
            self._add("one cache", name, self.upkeep_entry)
        if hasattr(self.module, "DistributedCacheClassificationLoss"):
            self.makers["DistributedCacheClassificationLoss"] = self.distributed_entry
        if backend.bind:
            for name in ("init", "bind", "shardings", "key"):
                self._add("jax", name, self.jax_entry)

    def _add(self, what, kind, make):
        self.makers[f"{what}, {kind}"] = lambda: make(kind)

    def call_in_chunks(self, network, size, rows):
        """Check the size, and use another: many rows, one by one, would take too long."""
        self.module.in_chunks(network, size)
        return self.module.in_chunks(network, 10**6)(rows)

    # Parts of arguments.

    def array(self, *shape):
        return self.native(self.rng.normal(size=shape).astype(np.float32))

    def namespace(self):
        return {"xp": None} if self.module is negcache_core else {}

    def rows(self, count, *more):
        ids = self.native(np.arange(count))
        found = {"x": self.array(count, D), "id": ids, "log_q": self.array(count)}
        return {**found, **{key: self.array(count, D) for key in more}}

    def specs(self):
        dtypes = {"id": "int64"}
        return {
            key: self.module.FieldSpec(shape, dtypes.get(key, "float32"))
            for key, shape in FIELDS.items()
        }

    def manager(self, **options):
        return self.module.CacheManager(self.specs(), C, **options)

    def cache(self):
        age = self.native(np.asarray([0, 1, 2, EMPTY], np.int32))
        return NegativeCache(self.rows(C, "embedding"), age)

    def loss(self, kind="paper", **options):
        given = {"embedding_key": "embedding", "data_keys": ("x",), **LOSSES[kind], **options}
        seeded = {} if self.backend.bind else {"generator": 1}  # JAX has no hidden state
        return self.module.CacheClassificationLoss(**seeded, **given)

    def noise(self, kind):
        return self.native(self.rng.random((B, LOSSES[kind].get("num_samples", 1), 2)))

    def options(self, kind):
        own = {"hard_negative_embeddings": self.array(B, 2, D), "sample_weight": self.array(B)}
        if kind == "shared":
            own["positive_ids"] = self.native(np.asarray([[0, 1], [1, 2]]))
            own["hard_negative_features"] = {"id": self.native(np.asarray([[0, 1], [3, 2]]))}
        return own

    def handler(self, kind="paper"):
        made = self.module.CacheLossHandler(self.manager(), self.loss(kind), "embedding", ("x",))
        return self._held(made, self.rows(3))

    def several(self):
        made = self.module.MultiCacheLossHandler(
            {"a": self.manager(unique_key="id"), "b": self.manager()},
            self.loss(),
            "embedding",
            ("x",),
        )
        return self._held(made, {"a": self.rows(3), "b": self.rows(2)})

    def _held(self, made, corpus):
        if self.backend.bind:
            made = made.bind(made.init(jax.random.key(0)))
        method(made, "prefill")(tower, corpus, 2)
        return made

    # Entries.

    def manager_entry(self):
        def make(specs, cache_size, use_lru, unique_key):
            made = self.module.CacheManager(specs, cache_size, use_lru, unique_key=unique_key)
            return made.init_cache()

        options = {"cache_size": C, "use_lru": True, "unique_key": "id"}
        return Entry(make, {"specs": self.specs(), **options})

    def update_entry(self):
        kept = self.cache()
        arguments = {
            "cache": kept,
            "new_items": self.rows(B, "embedding"),
            "new_items_mask": self.native(np.asarray([True, False])),
            "updated_item_data": {
                "embedding": self.array(1, D),
                "id": self.native(np.asarray([3])),
            },
            "updated_item_indices": self.native(np.asarray([2])),
            "updated_item_mask": self.native(np.asarray([True])),
        }
        return Entry(self.manager(unique_key="id").update_cache, arguments, kept)

    def loss_entry(self, kind):
        own, kept = self.loss(kind), self.cache()
        arguments = {
            "doc_network": tower,
            "query_embeddings": self.array(B, D),
            "pos_doc_embeddings": self.array(B, D),
            "cache": kept,
            "pos_features": self.rows(B),
            "noise": self.noise(kind),
            **self.options(kind),
        }
        if not self.backend.bind:
            del arguments["noise"]  # it draws
        return Entry(own, arguments, (own, kept))

    def retrieve_entry(self, kind):
        own, kept = self.loss(kind), self.cache()
        arguments = {
            "query_embeddings": self.array(B, D),
            "cache": {"a": kept, "b": self.cache()},
            "pos_features": self.rows(B),
            "noise": self.noise(kind),
        }
        if kind == "shared":
            arguments["positive_ids"] = {"id": self.native(np.asarray([0, 1]))}
        if kind == "exact_query":
            arguments["pos_doc_embeddings"] = self.array(B, D)
        return Entry(own.retrieve, arguments, (own, kept))

    def phase_two_entry(self, kind):
        own, query = self.loss(kind), self.array(B, D)
        found = own.retrieve(
            query,
            self.cache(),
            pos_features=self.rows(B),
            pos_doc_embeddings=self.array(B, D),
            noise=self.noise(kind),
        )
        options = self.options(kind)
        options.pop("positive_ids", None)
        arguments = {
            "query_embeddings": query,
            "pos_doc_embeddings": self.array(B, D),
            "neg_doc_embeddings": tower(found.features),
            "retrieval": found,
        }
        return Entry(own.loss_from_negatives, {**arguments, **options})

    def step_entry(self, kind):
        made = self.handler(kind)
        arguments = {
            "item_network": tower,
            "query_embeddings": self.array(B, D),
            "pos_item_embeddings": self.array(B, D),
            "features": self.rows(B),
            **self.options(kind),
        }
        return Entry(method(made, "update_cache_and_compute_loss"), arguments, made)

    def commit_entry(self):
        made = self.handler()
        query, positive, features = self.array(B, D), self.array(B, D), self.rows(B)
        found = method(made, "retrieve")(query, features)
        result = method(made, "compute_loss")(query, positive, tower(found.features), found)
        arguments = {"result": result, "pos_item_embeddings": positive, "features": features}
        return Entry(method(made, "commit"), arguments, made)

    def upkeep_entry(self, name):
        made = self.handler()
        arguments = {
            "refresh": {"item_network": tower, "n": 2},
            "prefill": {
                "item_network": tower,
                "features": self.rows(3),
                "batch_size": 2,
                "progress": None,
            },
        }
        # A prefill that fails keeps the batches before it; then all are checked before the first.
        if name in arguments:
            return Entry(method(made, name), arguments[name], made)
        return self.stored_entry(name, made, self.cache())

    def stored_entry(self, name, made, cache):
        """Return an entry about what is saved, restored or drawn."""
        if name == "plot_cache":
            history = {1: {"effective_negatives": 2.0}}
            arguments = {"handler": made, "item_network": tower, "history": history, "rows": 2}
            return Entry(self.module.plot_cache, arguments, made)
        path = self.folder / f"{type(made).__name__}"
        method(made, "save")(path)
        arguments = {
            "save": {"path": path},
            "load": {"path": path, "resize": False, "draws": True},
            "restore": {"cache": cache, "resize": True},
        }

        def call(**given):
            # A name that is made up is one in the folder; as a file it may or may not be there.
            if isinstance(given.get("path"), str):
                given["path"] = self.folder / f"made-up-{given['path']}"
            with contextlib.suppress(FileNotFoundError):
                method(made, name)(**given)

        return Entry(call, arguments[name], made)

    def several_entry(self, name):
        made = self.several()
        features = {"a": self.rows(B), "b": self.rows(1)}
        query = {"query_embeddings": self.array(B, D), "new_item_features": features}
        arguments = {
            "update_cache_and_compute_loss": {
                "item_network": tower,
                "pos_item_embeddings": self.array(B, D),
                "new_item_embeddings": {"a": self.array(B, D), "b": self.array(1, D)},
                **query,
            },
            "retrieve": query,
            "refresh": {"item_network": tower, "n": 2, "cache_name": "a"},
            "prefill": {"item_network": tower, "features": features, "batch_size": 2},
        }
        if name in arguments:
            return Entry(method(made, name), arguments[name], made)
        return self.stored_entry(name, made, {"a": self.cache(), "b": self.cache()})

    def functions_of_a_loss(self):
        def run(scale, score_transform, reducer, retrieval_fn):
            own = self.loss(
                num_samples=1,
                scale=scale,
                score_transform=score_transform,
                reducer=reducer,
                retrieval_fn=retrieval_fn,
            )
            query = self.array(B, D)
            found = own.retrieve(query, self.cache())
            own.loss_from_negatives(query, query, tower(found.features), found)

        chosen = self.native(np.zeros((B, 1), np.int64))
        arguments = {
            "scale": self.array,
            "score_transform": lambda scores: scores * 2.0,
            "reducer": lambda losses: losses,
            "retrieval_fn": lambda scores: chosen,
        }
        return Entry(run, arguments)

    def functions_of_a_step(self):
        def run(new_items_filter, item_network, cache_loss):
            made = self.module.CacheLossHandler(
                self.manager(), cache_loss, "embedding", ("x",), new_items_filter=new_items_filter
            )
            if self.backend.bind:
                made = made.bind(made.init(jax.random.key(0)))
            query, features = self.array(B, D), self.rows(B)
            method(made, "update_cache_and_compute_loss")(item_network, query, query, features)

        passes = self.native(np.asarray([True, False]))
        arguments = {
            "new_items_filter": lambda cache, new_items: passes,
            "item_network": tower,
            "cache_loss": self.loss(),
        }
        return Entry(run, arguments)

    def filter_entry(self):
        kept = self.cache()
        arguments = {"keys": ("id",), "cache": kept, "new_items": self.rows(B)}
        return Entry(
            lambda keys, cache, new_items: self.module.IsInCacheFilterFn(keys)(cache, new_items),
            arguments,
            kept,
        )

    def gumbel_entry(self):
        def run(inv_temp, scores, noise):
            return self.module.GumbelMaxRetrievalFn(inv_temp)(scores, noise=noise)

        scores, noise = self.array(B, C), self.array(B, C)
        return Entry(run, {"inv_temp": 1.0, "scores": scores, "noise": noise})

    def distributed_entry(self):
        """Return what is refused where there are no replicas; TensorFlow always has one."""
        arguments = {"estimator": "shared", "in_batch_negatives": True, "top_k": None}
        if self.backend.name != "tensorflow":
            arguments["group"] = "data"

        def run(**options):
            own = self.module.DistributedCacheClassificationLoss("embedding", ("x",), **options)
            query, features = self.array(B, D), self.rows(B)
            own(tower, query, query, {"a": self.cache()}, pos_features=features)

        return Entry(run, arguments)

    def jax_entry(self, name):
        made = self.module.CacheLossHandler(self.manager(), self.loss(), "embedding", ("x",))
        key = jax.random.key(0)
        query = {"query_embeddings": self.array(B, D), "cache": self.cache(), "key": key}
        return {
            "init": Entry(made.init, {"key": key}),
            "bind": Entry(
                lambda state, n: made.refresh(state, tower, n),
                {"state": made.init(key), "n": 2},
            ),
            "shardings": Entry(made.shardings, {"mesh": None}),
            "key": Entry(self.loss().retrieve, query),
        }[name]

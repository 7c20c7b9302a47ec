"""Bad input: our own errors, which say what was given, what was expected and what to do."""

from types import SimpleNamespace

import negcache_torch
import numpy as np
import pytest
import torch
from backends import BACKENDS

import negcache_core as core
from negcache_core.arrays.backend import NUMPY

SPECS = {"x": core.FieldSpec((2,), "float32"), "id": core.FieldSpec((), "int32")}


def manager(**options):
    return core.CacheManager(**{"specs": SPECS, "cache_size": 2, **options})


def rows(count, **change):
    return {"x": np.zeros((count, 2), np.float32), "id": np.zeros(count, np.int32), **change}


def update(**arguments):
    own = manager()
    return own.update_cache(own.init_cache(), **arguments)


def loss(**options):
    arguments = {"embedding_key": "x", "data_keys": ("id",), **options}
    return core.CacheClassificationLoss(**arguments)


def call(
    query=(1, 2),
    positive=(1, 2),
    cache=None,
    dtype=np.float32,
    output=None,
    network=None,
    **options,
):
    cache = manager().init_cache() if cache is None else cache
    return loss(**options)(
        network or (lambda features: np.zeros(output or (len(features["id"]), 2), np.float32)),
        np.zeros(query, dtype),
        np.zeros(positive, dtype),
        cache,
    )


def tensorflow_parts():
    module = BACKENDS["tensorflow"].module
    return module.CacheManager(SPECS, 2), module.CacheClassificationLoss("x", ("id",))


def step(query=(1, 2), positive=(1, 2), dtype=np.float32, **options):
    """A step on a cache of embeddings (2,)."""
    return handler().update_cache_and_compute_loss(
        lambda features: np.zeros((len(features["id"]), 2), np.float32),
        np.zeros(query, np.float32),
        np.zeros(positive, dtype),
        {"id": np.zeros(1, np.int32)},
        **options,
    )


def mixed(still):
    """Whether a gradient reaches the items, as a library that differentiates would say it."""

    class Told(type(NUMPY)):
        def watch_gradients(self, arrays, check):
            check([name not in still for name in ("positives", "negatives")])
            return arrays

    own = loss()
    own.backend = Told()
    network, x = (lambda features: np.zeros((1, 2), np.float32)), np.zeros((1, 2), np.float32)
    return own(network, x, x, manager().init_cache())


def retrieve(arguments=(), **options):
    cache = manager().init_cache()
    return loss(**options).retrieve(np.zeros((1, 2), np.float32), cache, **dict(arguments))


def with_hard(features, hard=np.zeros((1, 1, 2), np.float32)):  # noqa: B008 - never written to
    own, pair = loss(id_key="id"), np.zeros((1, 2), np.float32)
    positives = {"id": np.zeros(1, np.int32)}
    drawn = own.retrieve(pair, manager().init_cache(), pos_features=positives)
    return own.loss_from_negatives(
        pair, pair, pair, drawn, hard_negative_embeddings=hard, hard_negative_features=features
    )


def handler(specs=SPECS, cache_loss=None, embedding_key="x", data_keys=("id",), **options):
    return core.CacheLossHandler(
        core.CacheManager(specs, 2), cache_loss or loss(), embedding_key, data_keys, **options
    )


CASES = [
    # specs and manager
    (
        lambda: manager(specs={}),
        core.KeysError,
        "specs is empty: name at least the embedding field.",
    ),
    (
        lambda: manager(specs=[("x", 1)]),
        core.KindError,
        "specs is a list: expected a dict such as {'embedding': FieldSpec((128,), 'float32')}.",
    ),
    (
        lambda: manager(specs={3: SPECS["x"]}),
        core.KeysError,
        "specs has key 3: field names are non-empty strings.",
    ),
    (
        lambda: manager(specs={"x": "float32"}),
        core.KindError,
        "field 'x' has spec 'float32': expected FieldSpec(shape, dtype), or any object with .shape "
        "and .dtype such as tf.io.FixedLenFeature.",
    ),
    (
        lambda: manager(specs={"x": core.FieldSpec((None, 2), "float32")}),
        core.ShapeError,
        "field 'x' has row shape (None, 2): every size must be a known, non-negative integer, "
        "because all rows of a cache have one shape. Pad variable-length features.",
    ),
    (
        lambda: manager(specs={"x": core.FieldSpec((2,), "complex64")}),
        core.DTypeError,
        "field 'x' has dtype complex64: expected bool, an integer or a real floating dtype. Store "
        "text as token ids, and complex numbers as two real fields.",
    ),
    (
        lambda: manager(specs={"x": core.FieldSpec((2,), "bfloat16")}),
        core.DTypeError,
        "dtype 'bfloat16' is not available in numpy: choose another dtype for the field.",
    ),
    (
        lambda: manager(cache_size=0),
        core.CapacityError,
        "cache_size is 0: a cache needs at least one slot.",
    ),
    (
        lambda: manager(cache_size=2.5),
        core.KindError,
        "cache_size is 2.5: expected a positive int, the number of slots.",
    ),
    (
        lambda: manager(unique_key="x"),
        core.DTypeError,
        "unique_key 'x' has dtype float32: floating values that went through a network are seldom "
        "equal. Identify items by an integer field.",
    ),
    (
        lambda: manager(unique_key="item"),
        core.KeysError,
        "unique_key 'item' is not among the specs ['id', 'x']: name an integer field that "
        "identifies an item, or add it to the specs.",
    ),
    (
        lambda: manager(unique_key=("id",)),
        core.KindError,
        "unique_key is ('id',): expected one field name, or None.",
    ),
    (
        lambda: manager(unique_key="id").update_cache(
            core.NegativeCache({"x": np.zeros((1, 2), np.float32)}, np.zeros(1, np.int32)),
            new_items={"x": rows(1)["x"]},
        ),
        core.KeysError,
        "unique_key 'id' is not in the cache, which has ['x']: make it with this manager's "
        "init_cache().",
    ),
    # update_cache
    (
        lambda: update(new_items=rows(3)),
        core.CapacityError,
        "cannot insert 3 rows into a cache of 2 slots: each step would overwrite itself. Raise "
        "cache_size, or insert fewer rows.",
    ),
    (
        lambda: update(new_items={"x": rows(1)["x"], "z": rows(1)["id"]}),
        core.KeysError,
        "new_items has keys ['x', 'z']: expected exactly ['id', 'x']; missing: ['id']; unknown: "
        "['z'].",
    ),
    (
        lambda: update(new_items=[1]),
        core.KindError,
        "new_items is a list: expected a dict of field name -> array.",
    ),
    (
        lambda: update(new_items=rows(1, x=np.zeros((1, 3), np.float32))),
        core.ShapeError,
        "new_items['x'] has shape (1, 3): expected (n, 2). One row per item, each of the field's "
        "shape.",
    ),
    (
        lambda: update(new_items=rows(2, id=np.zeros(1, np.int32))),
        core.ShapeError,
        "new_items has row counts {'x': 2, 'id': 1}: expected the same number of rows in all "
        "fields.",
    ),
    (
        lambda: update(new_items=rows(1, id=np.zeros(1, np.int64))),
        core.DTypeError,
        "new_items['id'] has dtype int64, but its field stores int32: expected the field's dtype, "
        "any floating one for a floating field, or a narrower integer for an integer field. Cast "
        "the rows, or declare the field with their dtype.",
    ),
    (
        lambda: update(new_items=rows(2), new_items_mask=np.ones(1, bool)),
        core.ShapeError,
        "new_items_mask has shape (1,): expected (2,). One bool for each row.",
    ),
    (
        lambda: update(new_items=rows(1), new_items_mask=np.ones(1)),
        core.DTypeError,
        "new_items_mask has dtype float64: expected bool.",
    ),
    (
        lambda: update(updated_item_data={"x": rows(1)["x"]}),
        core.KeysError,
        "updated_item_data, updated_item_indices and updated_item_mask belong together: expected "
        "rows and their slots (the mask may be left out), or none of the three.",
    ),
    (
        lambda: update(updated_item_data={"y": rows(1)["x"]}, updated_item_indices=[0]),
        core.KeysError,
        "updated_item_data has keys ['y']: expected some of ['id', 'x']; unknown: ['y'].",
    ),
    (
        lambda: update(updated_item_data={"x": rows(1)["x"]}, updated_item_indices=[0, 1]),
        core.ShapeError,
        "updated_item_indices has shape (2,): expected (1,). One slot for each row of "
        "updated_item_data.",
    ),
    (
        lambda: update(updated_item_data={"x": rows(1)["x"]}, updated_item_indices=[0.5]),
        core.DTypeError,
        "updated_item_indices has dtype float64: expected integers.",
    ),
    # the loss
    (
        lambda: loss(data_keys="id"),
        core.KindError,
        "data_keys is 'id': expected several field names, such as ('token_ids',).",
    ),
    (
        lambda: loss(data_keys=()),
        core.KeysError,
        "data_keys is empty: name the fields that the item network takes.",
    ),
    (
        lambda: loss(top_k=0),
        core.CapacityError,
        "top_k is 0: expected at least 1, or None to use every slot.",
    ),
    (lambda: loss(top_k=1.5), core.KindError, "top_k is 1.5: expected None or a positive int."),
    (
        lambda: loss(estimator="best"),
        core.OptionError,
        "estimator is 'best': expected one of ['auto', 'exact_query', 'paper', 'shared'].",
    ),
    (
        lambda: loss(num_samples=0),
        core.OptionError,
        "num_samples is 0: expected a positive int.",
    ),
    (
        lambda: loss(reducer="mean"),
        core.KindError,
        "reducer is 'mean': expected a function, or None.",
    ),
    (
        lambda: loss(id_key="id", id_keys=("id",)),
        core.OptionError,
        "id_key is 'id' and id_keys ('id',): give only one of them; id_key='x' is short for "
        "id_keys=('x',).",
    ),
    (
        lambda: loss(id_keys="id"),
        core.KindError,
        "id_keys is 'id': expected several field names, such as ('item_id',).",
    ),
    (
        lambda: loss(id_keys=("id", "id")),
        core.OptionError,
        "id_keys is ('id', 'id'): name each field once.",
    ),
    (
        lambda: loss(group_key=3),
        core.KindError,
        "group_key is 3: expected a field name, or None.",
    ),
    (lambda: loss(margin="0.1"), core.KindError, "margin is '0.1': expected a number."),
    (
        lambda: loss(margin=float("inf")),
        core.OptionError,
        "margin is inf: expected a finite number.",
    ),
    (
        lambda: retrieve(margin=0.1),
        core.OptionError,
        "margin compares a row's score with the positive's, but there are no positives: pass "
        "pos_doc_embeddings to the loss's retrieve(), or pos_item_embeddings to the handler's.",
    ),
    (
        lambda: retrieve({"pos_doc_embeddings": np.zeros((2, 2), np.float32)}, margin=0.1),
        core.ShapeError,
        "pos_doc_embeddings has shape (2, 2): expected (1, 2).",
    ),
    (
        lambda: retrieve({"positive_ids": [3]}),
        core.OptionError,
        "positive_ids were given to a loss without id_keys: name the cache's id fields.",
    ),
    (
        lambda: retrieve({"positive_ids": {"item": [3]}}, id_key="id"),
        core.KeysError,
        "positive_ids has keys ['item']: expected some of ['id']; unknown: ['item'].",
    ),
    (
        lambda: retrieve({"positive_ids": {"id": [[0.5]]}}, id_key="id"),
        core.DTypeError,
        "positive_ids['id'] has dtype float64: expected integers.",
    ),
    (
        lambda: retrieve(group_key="x"),
        core.ShapeError,
        "field 'x' has shape (2, 2): expected (C,). group_key needs one number for each row.",
    ),
    (
        lambda: retrieve(group_key="id"),
        core.KeysError,
        "pos_features lack 'id': pass the field 'id' of the batch's positives, (B,).",
    ),
    (
        lambda: with_hard({"id": [[1]]}, hard=None),
        core.OptionError,
        "hard_negative_features were given without hard_negative_embeddings: pass both, or "
        "neither.",
    ),
    (
        lambda: with_hard({"x": [[1]]}),
        core.KeysError,
        "hard_negative_features lack ['id']: expected an array (B, H) for each of id_keys and "
        "group_key, ['id']. Without hard_negative_features all hard negatives count.",
    ),
    (
        lambda: with_hard({"id": np.zeros(1, np.int32)}),
        core.ShapeError,
        "hard_negative_features['id'] has shape (1,): expected (1, 1). One for each hard negative.",
    ),
    (
        lambda: with_hard({"id": np.zeros((1, 1), np.int64)}),
        core.DTypeError,
        "hard_negative_features['id'] has dtype int64, but its field stores int32: expected the "
        "field's dtype, any floating one for a floating field, or a narrower integer for an "
        "integer field. Cast the rows, or declare the field with their dtype.",
    ),
    (
        lambda: call(top_k=3),
        core.CapacityError,
        "top_k is 3, but there are 2 slots: at most one group for each slot. Lower top_k, or raise "
        "cache_size.",
    ),
    (
        lambda: call(query=(1, 3), positive=(1, 3)),
        core.ShapeError,
        "field 'x' of the cache has shape (2, 2): expected width 3, that of query_embeddings and "
        "pos_doc_embeddings. Make the cache with FieldSpec((3,), …) for it.",
    ),
    (
        lambda: call(query=(1, 3)),
        core.ShapeError,
        "query_embeddings has shape (1, 3): expected width 2, that of field 'x' of the cache and "
        "pos_doc_embeddings.",
    ),
    (
        lambda: call(positive=(1, 3)),
        core.ShapeError,
        "pos_doc_embeddings has shape (1, 3): expected width 2, that of field 'x' of the cache and "
        "query_embeddings.",
    ),
    (
        lambda: call(query=(1, 4), positive=(1, 3)),
        core.ShapeError,
        "query_embeddings has shape (1, 4), pos_doc_embeddings has shape (1, 3) and field 'x' of "
        "the cache has shape (2, 2): expected one width, the last size, that of the towers and in "
        "the cache's specs.",
    ),
    (
        lambda: step(positive=(1, 3)),
        core.ShapeError,
        "pos_item_embeddings has shape (1, 3): expected width 2, that of field 'x' of the cache "
        "and query_embeddings.",
    ),
    (
        lambda: step(query=(1, 3), positive=(1, 3)),
        core.ShapeError,
        "field 'x' of the cache has shape (2, 2): expected width 3, that of pos_item_embeddings "
        "and query_embeddings. Make the cache with FieldSpec((3,), …) for it.",
    ),
    (
        lambda: step(query=(1, 3)),
        core.ShapeError,
        "query_embeddings has shape (1, 3): expected width 2, that of field 'x' of the cache and "
        "pos_doc_embeddings.",
    ),
    (
        lambda: step(dtype=np.int64),
        core.DTypeError,
        "pos_item_embeddings has dtype int64: expected float16, bfloat16, float32 or float64. Pass "
        "the network's output, not its input.",
    ),
    (
        lambda: step(hard_negative_embeddings=np.zeros((1, 2, 3), np.float32)),
        core.ShapeError,
        "hard_negative_embeddings has shape (1, 2, 3): expected width 2, that of field 'x' of the "
        "cache, query_embeddings, pos_doc_embeddings and the item network's output.",
    ),
    (
        lambda: handler().retrieve(np.zeros((1, 3), np.float32), {"id": np.zeros(1, np.int32)}),
        core.ShapeError,
        "query_embeddings has shape (1, 3) and field 'x' of the cache has shape (2, 2): expected "
        "one width, the last size, that of the towers and in the cache's specs.",
    ),
    (
        lambda: handler().prefill(
            lambda features: np.zeros((1, 3), np.float32), {"id": np.zeros(1, np.int32)}, 1
        ),
        core.ShapeError,
        "the item network's output has shape (1, 3) and field 'x' of the cache has shape (2, 2): "
        "expected one width, the last size, that of the towers and in the cache's specs.",
    ),
    # what must not learn by accident
    (
        lambda: mixed({"positives"}),
        core.OptionError,
        "the positives carry no gradient, but the drawn negatives do: the item network would learn "
        "from the drawn negatives alone. Embed all items with the network that is trained, "
        "outside no_grad and without detach or stop_gradient. If this is intended, pass "
        "constant=('positives',).",
    ),
    (
        lambda: mixed({"negatives"}),
        core.OptionError,
        "the drawn negatives carry no gradient, but the positives do: the item network would learn "
        "from the positives alone. Embed all items with the network that is trained, outside "
        "no_grad and without detach or stop_gradient. If this is intended, pass "
        "constant=('negatives',).",
    ),
    (
        lambda: step(constant="positives"),
        core.KindError,
        "constant is 'positives': expected several names, such as ('positives',).",
    ),
    (
        lambda: step(constant=("items",)),
        core.OptionError,
        "constant has ['items']: expected names among ['positives', 'negatives', "
        "'hard_negatives'].",
    ),
    (
        lambda: negcache_torch.CacheClassificationLoss(
            "x", ("id",), scale=torch.zeros((), requires_grad=True).exp()
        ),
        core.OptionError,
        "scale is a tensor that was computed from others: its graph lasts for one step, so the "
        "next could not differentiate it. Pass the parameter itself, scale=log_scale, or a "
        "function that computes it in every step, scale=lambda: log_scale.exp().",
    ),
    # networks that take no dict of these fields
    (
        lambda: call(network=lambda features: features + 1.0),
        core.KindError,
        "the item network raised TypeError when called with a dict of arrays, fields ['id']: "
        "wrap yours, for example lambda features: encoder(features['id']).",
    ),
    (
        lambda: call(network=lambda features: features["label"]),
        core.KeysError,
        "the item network reads field 'label', but gets ['id'], the data_keys: labels are not "
        "among them. Add 'label' to data_keys, or do not use it in the network.",
    ),
    (
        lambda: call(positive=(2, 2)),
        core.ShapeError,
        "query_embeddings has 1 rows and pos_doc_embeddings 2: expected one positive item for each "
        "query.",
    ),
    (
        lambda: call(dtype=np.int64),
        core.DTypeError,
        "query_embeddings has dtype int64: expected float16, bfloat16, float32 or float64. Pass "
        "the network's output, not its input.",
    ),
    (
        lambda: call(output=(1, 5)),
        core.ShapeError,
        "the item network's output has shape (1, 5): expected width 2, that of field 'x' of the "
        "cache, query_embeddings and pos_doc_embeddings.",
    ),
    (
        lambda: call(output=(3, 2)),
        core.ShapeError,
        "the item network's output has shape (3, 2): expected (1, 2).",
    ),
    (
        lambda: call(cache=SimpleNamespace(data={})),
        core.KindError,
        "cache 'cache' is a SimpleNamespace: expected a NegativeCache(data, age), as "
        "CacheManager.init_cache() makes.",
    ),
    (
        lambda: call(cache=core.NegativeCache({"x": np.zeros((2, 2))}, np.zeros(3, np.int32))),
        core.ShapeError,
        "cache 'cache' has age of shape (3,) and rows by field {'x': 2}: expected one age, and one "
        "row of every field, for each slot.",
    ),
    (
        lambda: call(data_keys=("token",)),
        core.KeysError,
        "cache 'cache' lacks ['token'] of embedding_key and data_keys ['x', 'token']: it has "
        "['id', 'x']. Add the field to its specs, or correct the keys.",
    ),
    (
        lambda: call(retrieval_fn=lambda scores: np.zeros((3, 1))),
        core.OptionError,
        "retrieval_fn returned shape (3, 1) and dtype float64 for 1 queries: expected integer "
        "slots of shape (B, 1), or (B, S) for S draws each.",
    ),
    (
        lambda: call(cache={}),
        core.KeysError,
        "cache is an empty dict: expected at least one NegativeCache.",
    ),
    (
        lambda: loss().retrieve(
            np.zeros((1, 2), np.float32), manager().init_cache(), noise=np.zeros((2, 1, 2))
        ),
        core.ShapeError,
        "noise has shape (2, 1, 2): expected (1, 1, 2). Uniforms in [0, 1).",
    ),
    (
        lambda: loss().retrieve(
            np.zeros((1, 2), np.float32), manager().init_cache(), noise=np.zeros((1, 1, 2), int)
        ),
        core.DTypeError,
        "noise has dtype int64: expected float16, bfloat16, float32 or float64. Pass the network's "
        "output, not its input.",
    ),
    (
        lambda: loss().retrieve(
            np.zeros((1, 2), np.float32), manager().init_cache(), pos_features={"ids": 1}
        ),
        core.KeysError,
        "pos_features lack ['id']: expected everything that the item network takes, ['id'].",
    ),
    # filters and handlers
    (
        lambda: BACKENDS["tensorflow"].module.CacheLossHandler(*tensorflow_parts()).resize(3),
        core.OptionError,
        "resize changes shapes, but TensorFlow's variables keep theirs: make a new handler with "
        "the new cache_size, and call new.load(path, resize=True) on what this one's save(path) "
        "wrote, or new.restore(handler.cache, resize=True).",
    ),
    (
        lambda: core.IsInCacheFilterFn(("x",))(manager().init_cache(), rows(1)),
        core.DTypeError,
        "key 'x' has dtype float32: floating values that went through a network are seldom equal. "
        "Identify items by an integer field.",
    ),
    (
        lambda: core.IsInCacheFilterFn(("y",))(manager().init_cache(), rows(1)),
        core.KeysError,
        "key 'y' is not in the cache, which has ['id', 'x']: correct the filter's keys.",
    ),
    (
        lambda: core.IsInCacheFilterFn("id"),
        core.KindError,
        "keys is 'id': expected several field names, such as ('item_id',).",
    ),
    (
        lambda: handler(data_keys=("token",), cache_loss=loss(data_keys=("token",))),
        core.KeysError,
        "the specs of cache 'cache' lack ['token']: expected embedding_key 'x' and data_keys "
        "['token'] among ['id', 'x'].",
    ),
    (
        lambda: handler(embedding_key="id", data_keys=("x",), cache_loss=loss(embedding_key="id")),
        core.DTypeError,
        "embedding field 'id' of cache 'cache' is FieldSpec(shape=(), dtype='int32'): expected one "
        "vector for each row, of a floating dtype or int8, such as FieldSpec((128,), 'float32').",
    ),
    (
        lambda: handler({**SPECS, "x": core.FieldSpec((0,), "float32")}),
        core.ShapeError,
        "embedding field 'x' of cache 'cache' is FieldSpec(shape=(0,), dtype='float32'): expected "
        "a width D of at least 1.",
    ),
    (
        lambda: loss().retrieve(
            np.zeros((1, 0), np.float32),
            manager(specs={**SPECS, "x": core.FieldSpec((0,), "float32")}).init_cache(),
        ),
        core.ShapeError,
        "field 'x' has rows of width 0: expected a width D of at least 1.",
    ),
    (
        lambda: handler(new_items_filter="id"),
        core.KindError,
        "new_items_filter is 'id': expected a function (cache, new_items) -> bool mask such as "
        "IsInCacheFilterFn(keys), or None.",
    ),
    (
        lambda: handler().update_cache_and_compute_loss(
            lambda features: features["id"],
            np.zeros((1, 2), np.float32),
            np.zeros((1, 2), np.float32),
            {},
        ),
        core.KeysError,
        "features lack ['id']: the cache stores ['id'] of each item, but features have [].",
    ),
    (
        lambda: handler().retrieve(np.zeros((1, 2), np.float32), {}),
        core.KeysError,
        "features lack ['id']: the loss needs ['id'] of each positive, but features have [].",
    ),
    (
        lambda: handler(cache_loss=loss(log_frequency_key="log_q")),
        core.KeysError,
        "the loss reads ['log_q'] (id_keys, group_key, log_frequency_key), which the cache lacks: "
        "add the field to its specs, ['id', 'x'].",
    ),
    (
        lambda: handler(use_cross_replica=True).commit(
            handler_result(), np.zeros((1, 2), np.float32), {"id": np.zeros(1, np.int32)}
        ),
        core.OptionError,
        "use_cross_replica=True needs a distributed backend, but 'numpy' runs in one process: use "
        "negcache_torch or negcache_tensorflow, or leave the option off.",
    ),
    (
        lambda: core.approximate_top_k_with_indices(np.zeros(3), 1),
        core.ShapeError,
        "scores has shape (3,): expected (B, C).",
    ),
    (
        lambda: core.approximate_top_k_with_indices([[1.0]], 1),
        core.KindError,
        "cannot infer an array-API namespace from (list): pass arrays of one library, or the "
        "namespace as xp= (TensorFlow has none of its own: use negcache_tensorflow).",
    ),
    # networks in chunks
    (
        lambda: core.in_chunks(None, 2),
        core.KindError,
        "network is None: expected a function of features that returns embeddings.",
    ),
    (
        lambda: core.in_chunks(len, 2.0),
        core.KindError,
        "size is 2.0: expected the number of rows of a chunk, an int.",
    ),
    (
        lambda: core.in_chunks(len, 0),
        core.OptionError,
        "size is 0: a chunk needs at least 1 row.",
    ),
    (
        lambda: core.in_chunks(len, 2)({"x": "words"}),
        core.ShapeError,
        "the argument['x'] has shape (): expected (n, …), with a first axis to split.",
    ),
    (
        lambda: core.in_chunks(len, 2)([None, {}]),
        core.ShapeError,
        "the argument has no array in it: expected at least one, with rows to split.",
    ),
    (
        lambda: core.in_chunks(len, 2)({"x": np.zeros((2, 2)), "y": [None, np.zeros(3)]}),
        core.ShapeError,
        "the argument['x'] has 2 rows and the argument['y'][1] has 3: expected the same "
        "number in each, because chunks are taken from the first axis.",
    ),
    (
        lambda: core.in_chunks(lambda x: (x, x), 2)(np.zeros((3, 2))),
        core.KindError,
        "the network returned a tuple: expected one array, with a row for each input row. "
        "Take the embeddings out of it: lambda rows: network(rows)[0].",
    ),
    (
        lambda: core.in_chunks(np.sum, 2)(np.zeros((3, 2))),
        core.ShapeError,
        "the network returned shape () for a chunk of 2 rows: expected (2, D), one embedding a "
        "row.",
    ),
]


def handler_result():
    return core.CacheLossReturn(0.0, 0.0, None, None, None, 0.0)


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["torch", "tensorflow", "tf.function"])
def test_the_same_errors_come_from_every_backend_also_while_tracing(name):
    backend = BACKENDS[name]
    module = backend.module
    own = module.CacheManager(
        {"x": module.FieldSpec((2,), "float32"), "id": module.FieldSpec((), "int32")}, 2
    )
    for new_items, error, message in (
        (rows(1, x=np.zeros((1, 3), np.float32)), core.ShapeError, r"new_items\['x'\] has shape"),
        (rows(1, id=np.zeros(1, np.int64)), core.DTypeError, r"new_items\['id'\] has dtype int64"),
        ({"x": rows(1)["x"]}, core.KeysError, r"missing: \['id'\]"),
    ):
        with pytest.raises(error, match=message):
            backend.run(
                lambda cache, batch: own.update_cache(cache, new_items=batch),
                own.init_cache(),
                backend.native(new_items),
            )

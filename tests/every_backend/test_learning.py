"""Nothing learns by accident: what was forgotten is said at the first step, and nothing is done.

That some items carry a gradient and others do not is refused, and which combinations are, is a
check of the conformance kit. Here: a whole step is as if it had not been.
"""

import functools

import jax
import negcache_jax
import negcache_tensorflow
import negcache_torch
import numpy as np
import pytest
import tensorflow as tf
import torch
from backends import BACKENDS
from flax import nnx

from negcache_core import KeysError, KindError, OptionError
from negcache_core.losses.network import embedded_by

ROWS, WIDTH = 3, 2


def handler_of(module, **options):
    specs = {
        "x": module.FieldSpec((WIDTH,), "float32"),
        "label": module.FieldSpec((), "int32"),
        "embedding": module.FieldSpec((WIDTH,), "float32"),
    }
    loss = module.CacheClassificationLoss("embedding", ("x",), estimator="shared", **options)
    return module.CacheLossHandler(module.CacheManager(specs, 8), loss)


def batch(seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return x, {"x": x, "label": np.arange(ROWS, dtype=np.int32)}


def torch_steps():
    """Return a step in which `still` has no gradient, and a function that returns the state."""
    handler, tower = handler_of(negcache_torch, generator=0), torch.nn.Linear(WIDTH, WIDTH)

    def step(seed, still, **options):
        query, features = BACKENDS["torch"].native(batch(seed))
        items, drawn = tower(features["x"]), lambda given: tower(given["x"])
        if still == "positives":
            items = items.detach()
        if still == "negatives":
            drawn = torch.no_grad()(drawn)
        return handler.update_cache_and_compute_loss(drawn, query, items, features, **options)

    return step, lambda: [value.clone().numpy() for value in handler.state_dict().values()]


def tensorflow_steps(trace):
    def make():
        handler = handler_of(negcache_tensorflow, generator=0)
        kernel = tf.Variable(tf.eye(WIDTH))

        def run(query, features, still, options):
            stop = tf.stop_gradient
            with tf.GradientTape():
                items = tf.matmul(features["x"], kernel)
                if still == "positives":
                    items = stop(items)

                def network(given):
                    drawn = tf.matmul(given["x"], kernel)
                    return stop(drawn) if still == "negatives" else drawn

                return handler.update_cache_and_compute_loss(
                    network, query, items, features, **options
                )

        def step(seed, still, **options):
            arguments = BACKENDS["tensorflow"].native(batch(seed))
            if not trace:
                return run(*arguments, still, options)
            return tf.function(lambda *given: run(*given, still, options))(*arguments)

        generator = handler.cache_loss.generator
        return step, lambda: [
            generator.state.numpy(),
            handler.cache.age.numpy(),
            *(rows.numpy() for rows in handler.cache.data.values()),
        ]

    return make


def jax_steps(transform):
    def make():
        handler = handler_of(negcache_jax)
        state = [handler.init(jax.random.key(0))]

        def step(seed, still, **options):
            query, features = BACKENDS["jax"].native(batch(seed))
            stop = jax.lax.stop_gradient

            def loss_of(kernel, before):
                def network(given):
                    drawn = given["x"] @ kernel
                    return stop(drawn) if still == "negatives" else drawn

                items = features["x"] @ kernel
                if still == "positives":
                    items = stop(items)
                return handler.update_cache_and_compute_loss(
                    before, network, query, items, features, **options
                )

            kernel = jax.numpy.eye(WIDTH)
            (loss, after), _ = transform(loss_of)(kernel, state[0])
            state[0] = after
            return loss

        return step, lambda: [
            np.asarray(jax.random.key_data(each) if each.dtype == state[0].key.dtype else each)
            for each in jax.tree.leaves(state[0])
        ]

    return make


def gradient_of(function):
    return jax.value_and_grad(function, has_aux=True)


STEPS = {
    "torch": torch_steps,
    "tensorflow": tensorflow_steps(trace=False),
    "tf.function": tensorflow_steps(trace=True),
    "jax": jax_steps(gradient_of),
    "jax.jit": jax_steps(lambda function: jax.jit(gradient_of(function))),
    "jax.grad of jit": jax_steps(lambda function: gradient_of(jax.jit(function))),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_a_forgotten_no_grad_is_refused_and_leaves_all_as_it_was(name):
    step, state = STEPS[name]()
    step(0, None)
    before = state()
    for still, words in (("positives", "the positives"), ("negatives", "the drawn negatives")):
        with pytest.raises(OptionError, match=f"{words} carry no gradient"):
            step(1, still)
        for ours, theirs in zip(state(), before, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    after = step(1, "positives", constant=("positives",))
    twin, _ = STEPS[name]()
    if name != "torch":  # whose tower is another one
        twin(0, None)
        np.testing.assert_array_equal(np.asarray(after), np.asarray(twin(1, None)))


def test_what_a_tape_outside_of_a_trace_records_is_not_refused():
    """An argument of a tf.function may carry a gradient of which the trace knows nothing."""
    loss = negcache_tensorflow.CacheClassificationLoss("embedding", ("x",), generator=0)
    x, kernel = tf.constant(batch(0)[0]), tf.Variable(tf.eye(WIDTH))
    cache = BACKENDS["tensorflow"].native(
        negcache_tensorflow.NegativeCache({"x": x, "embedding": x}, np.zeros(ROWS, np.int32))
    )

    @tf.function
    def step(positives):
        network = lambda features: tf.matmul(features["x"], kernel)  # noqa: E731 - as users write
        return loss(network, x, 1.0 * positives, cache).loss

    with tf.GradientTape() as tape:
        items = tf.matmul(x, kernel)
        value = step(items)
    assert tape.gradient(value, items) is not None


def test_a_rank_without_rows_is_not_asked():
    loss = negcache_torch.CacheClassificationLoss("embedding", ("x",), generator=0)
    cache = BACKENDS["torch"].native(
        negcache_torch.NegativeCache(
            {"x": batch(0)[0], "embedding": batch(0)[0]}, np.zeros(ROWS, np.int32)
        )
    )
    tower, none = torch.nn.Linear(WIDTH, WIDTH), torch.zeros(0, WIDTH)
    assert loss(lambda features: tower(features["x"]), none, none, cache).loss.requires_grad


def test_under_no_grad_nothing_is_told():
    step, _ = torch_steps()
    with torch.no_grad():
        step(0, "positives")


@pytest.mark.parametrize("constant", ["positives", ("queries",)])
def test_a_wrong_name_of_what_is_constant(constant):
    step, _ = torch_steps()
    with pytest.raises((KindError, OptionError), match="constant"):
        step(0, None, constant=constant)


# A scale whose graph is of one step.


def test_a_scale_with_a_graph_is_refused_as_the_loss_is_made():
    log_scale = torch.nn.Parameter(torch.zeros(()))
    make = functools.partial(negcache_torch.CacheClassificationLoss, "embedding", ("x",))
    with pytest.raises(OptionError, match=r"scale=lambda: log_scale\.exp\(\)"):
        make(scale=log_scale.exp())
    for scale in (
        log_scale,
        torch.ones((), requires_grad=True),
        log_scale.exp().detach(),
        log_scale.exp,
    ):
        make(scale=scale)


def test_a_scale_of_tensorflow_must_not_be_of_another_trace():
    log_scale, kept = tf.Variable(0.0), []
    make = functools.partial(
        negcache_tensorflow.CacheClassificationLoss,
        "embedding",
        ("x",),
        generator=tf.random.Generator.from_seed(0),
    )
    with tf.GradientTape():  # a loss that is made in each step
        make(scale=tf.exp(log_scale))

    @tf.function
    def trace():
        kept.append(tf.exp(log_scale))
        make(scale=kept[-1])  # of this very trace
        return kept[-1]

    trace()
    with pytest.raises(OptionError, match="scale is a tensor that was computed"):
        make(scale=kept[0])
    for scale in (log_scale, tf.exp(log_scale), lambda: tf.exp(log_scale)):
        make(scale=scale)


def test_a_traced_scale_is_documented_use_in_jax():
    jax.grad(lambda scale: handler_of(negcache_jax, scale=scale).cache_loss.scale)(1.0)


# Networks that take no dict.


class NeedsAnArray(torch.nn.Module):
    def forward(self, x):
        return x.mean(1)


OTHER = {"a": 1.0}
FEATURES = {"x": np.ones((ROWS, WIDTH), np.float32)}


def of_torch(network):
    return lambda features: network(BACKENDS["torch"].native(features))


def built(model):
    model(FEATURES["x"])
    return model


class ReadsADict(tf.keras.Model):
    """A network that takes a dict, and fails with what it finds there."""

    def __init__(self):
        super().__init__()
        self.dense = tf.keras.layers.Dense(2)
        self.dense.build((None, WIDTH + 1))

    def call(self, features):
        return self.dense(features["x"])


class ReadsADictInTorch(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.linear(torch.as_tensor(x), torch.ones(2, WIDTH + 1))


NO_DICT = {
    "torch.nn.Linear": torch.nn.Linear(WIDTH, WIDTH),
    "torch.nn.Embedding": torch.nn.Embedding(4, WIDTH),
    "torch, a method": NeedsAnArray(),
    "torch, an operator": lambda features: features @ torch.eye(WIDTH),
    "subscripts": lambda features: features[0],
    "slices": lambda features: features[:, 0],
    "numpy": np.tanh,
    "jax": jax.numpy.tanh,
    "jax, a product": lambda features: jax.numpy.dot(features, np.eye(WIDTH)),
    "tensorflow": tf.tanh,
    "keras": tf.keras.layers.Dense(WIDTH),
    "keras, a model": tf.keras.Sequential([tf.keras.layers.Dense(WIDTH)]),
    "keras, a lookup": tf.keras.layers.Embedding(4, WIDTH),
    "keras, a built model": built(tf.keras.Sequential([tf.keras.layers.Dense(WIDTH)])),
    "flax": nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)),
    "jax, a lookup": lambda features: jax.numpy.eye(WIDTH)[features],
    "jax, traced": jax.jit(jax.numpy.tanh),
    "tensorflow, a lookup": lambda features: tf.gather(tf.eye(WIDTH), features),
}


@pytest.mark.parametrize("name", NO_DICT)
def test_a_network_that_takes_no_dict_is_told_so(name):
    with pytest.raises(KindError, match=r"lambda features: encoder\(features\['x'\]\)") as caught:
        embedded_by(NO_DICT[name], FEATURES)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "network",
    [
        lambda features: OTHER["b"],
        lambda features: OTHER + 1,
        lambda features: OTHER.mean(),
        lambda features: features["x"].nothing,
        lambda features: features["x"] @ np.ones((5, 5)),
        lambda features: torch.tanh(OTHER),
        lambda features: {**features}["x"][7],
        lambda features: int("no number"),
        ReadsADict(),
        lambda features: ReadsADictInTorch()(**features),
        lambda features: ReadsADictInTorch()(*features.values()),
        lambda features: jax.numpy.dot(features["x"], np.ones((WIDTH + 1, 2))),
        lambda features: jax.numpy.reshape(features.get("x"), (7, 7)),
        lambda features: NeedsAnArray()(OTHER),
    ],
)
def test_an_error_of_the_network_itself_passes_as_it_is(network):
    with pytest.raises(Exception) as bare:  # noqa: PT011 - compared with the other
        network(FEATURES)
    with pytest.raises(type(bare.value)) as caught:
        embedded_by(network, FEATURES)
    assert str(caught.value) == str(bare.value)
    assert caught.value.__cause__ is None


def reads_label(features):
    return features["x"] + features["label"]


def call_of(verb):
    module = negcache_torch
    handler = handler_of(module, generator=0)
    query, features = BACKENDS["torch"].native(batch(0))
    handler.prefill(lambda given: given["x"], features, ROWS)
    return {
        "step": lambda network: handler(network, query, query, features),
        "evaluate": lambda network: handler.evaluate(network, query, query, features),
        "prefill": lambda network: handler.prefill(network, features, ROWS),
        "refresh": lambda network: handler.refresh(network, ROWS),
        "loss": lambda network: handler.cache_loss(network, query, query, handler.cache),
    }[verb]


@pytest.mark.parametrize("verb", ["step", "evaluate", "prefill", "refresh", "loss"])
def test_every_verb_that_calls_the_network_says_it(verb):
    call = call_of(verb)
    with pytest.raises(KindError, match="called with a dict of arrays"):
        call(torch.nn.Linear(WIDTH, WIDTH))
    with pytest.raises(KeysError, match="reads field 'label', but gets"):
        call(reads_label)

"""Ways of training around a step: accumulation, checkpointing, several handlers, and threads."""

import copy
import functools
import io
import queue
import threading

import jax
import jax.numpy as jnp
import negcache_jax
import negcache_tensorflow
import negcache_torch
import numpy as np
import programs
import pytest
import tensorflow as tf
import torch
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS, SLOTS = 4, 3, 20


def handler_of(module, seed=0, **options):
    if module is not negcache_jax:
        options["generator"] = seed
    specs = {key: module.FieldSpec((WIDTH,), "float32") for key in ("x", "e")}
    return module.CacheLossHandler(
        module.CacheManager(specs, SLOTS),
        module.CacheClassificationLoss("e", ("x",), scale=2.0, **options),
        embedding_key="e",
        data_keys=("x",),
    )


def batch(seed, rows=ROWS):
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def tower_of(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, WIDTH)
    )


def torch_step(handler, tower, seed, *, wrap=lambda function: function):
    x = torch.as_tensor(batch(seed))
    network = wrap(lambda data: tower(data["x"]))
    items = network({"x": x})
    return handler.update_cache_and_compute_loss(network, x.flip(1), items, {"x": x})


def copied(state):
    return {key: value.clone() for key, value in state.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def test_accumulated_gradients_are_the_sum_and_each_micro_batch_is_a_step_of_the_cache():
    """As k steps with the weights unchanged between them, and the gradients added up."""
    accumulating, tower = handler_of(negcache_torch, estimator="exact_query"), tower_of().eval()
    apart, total = copy.deepcopy(accumulating), [0.0] * 4
    for seed in range(5):
        torch_step(accumulating, tower, seed).div(5).backward()
        loss = torch_step(apart, tower, seed)
        total = [
            old + new / 5
            for old, new in zip(total, torch.autograd.grad(loss, tower.parameters()), strict=True)
        ]
    for each, expected in zip(tower.parameters(), total, strict=True):
        torch.testing.assert_close(each.grad, expected)
    assert_same(accumulating.state_dict(), apart.state_dict())
    ages = accumulating.cache.age  # first row of the first batch, if not drawn since: 4 steps old
    assert int((ages != negcache_torch.EMPTY).sum()) == 5 * ROWS
    assert int(ages[ages != negcache_torch.EMPTY].max()) <= 4


@pytest.mark.parametrize("estimator", ["paper", "shared", "exact_query"])
def test_checkpointed_towers_in_torch_draw_nothing_anew_and_leave_the_cache_alone(estimator):
    """With dropout: the recomputation replays PyTorch's random state, and never the handler's."""
    plain, tower = handler_of(negcache_torch, estimator=estimator), tower_of()
    saving = copy.deepcopy(plain)
    calls = []

    def wrap(network):
        def counted(data):
            calls.append(1)
            return network(data)

        return functools.partial(checkpoint, counted, use_reentrant=False)

    for seed in range(4):
        found = []
        for handler, way in ((plain, lambda network: network), (saving, wrap)):
            torch.manual_seed(seed)
            loss = torch_step(handler, tower, seed, wrap=way)
            before = copied(handler.state_dict())
            found.append(torch.autograd.grad(loss, tower.parameters()))
            assert_same(handler.state_dict(), before)
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)
    assert_same(saving.state_dict(), plain.state_dict())
    assert len(calls) == 4 * 4  # positives and drawn rows, forward and in the backward pass


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noise", [None, torch.full((ROWS, 1, 2), 0.5)], ids=["drawn", "given"])
def test_a_checkpoint_around_a_whole_step_is_refused_and_the_cache_is_left_alone(reentrant, noise):
    handler, tower = handler_of(negcache_torch), tower_of()

    def whole(x):
        return handler.update_cache_and_compute_loss(
            lambda data: tower(data["x"]), x, tower(x), {"x": x}, noise=noise
        )

    x = torch.as_tensor(batch(0)).requires_grad_()
    loss = checkpoint(whole, x, use_reentrant=reentrant)
    before = copied(handler.state_dict())
    with pytest.raises(negcache_torch.OptionError, match="Checkpoint the towers inside"):
        loss.backward()
    assert_same(handler.state_dict(), before)


def test_recomputed_towers_in_tensorflow_draw_nothing_anew_and_leave_the_cache_alone():
    weights, histories = tf.Variable(np.eye(WIDTH, dtype=np.float32)), []
    for way in (lambda function: function, tf.recompute_grad):
        handler, calls = handler_of(negcache_tensorflow, estimator="exact_query"), []

        def tower(x, calls=calls):
            calls.append(1)
            return tf.nn.tanh(x @ weights)

        saving, history = way(tower), []
        for seed in range(3):
            x = tf.constant(batch(seed))
            with tf.GradientTape() as tape:
                loss = handler.update_cache_and_compute_loss(
                    lambda data, saving=saving: saving(data["x"]), x, saving(x), {"x": x}
                )
            before = handler.cache.age.numpy()
            history += [loss.numpy(), tape.gradient(loss, weights).numpy()]
            np.testing.assert_array_equal(handler.cache.age.numpy(), before)
        histories.append([*history, before, len(calls)])
    *plain, once = histories[0]
    *saved, twice = histories[1]
    for ours, theirs in zip(saved, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert twice == 2 * once


def test_rematerialised_towers_and_whole_steps_in_jax_are_the_plain_step():
    """There a step is a pure function: it can be run again as a whole."""
    handler, results = handler_of(negcache_jax), []

    def loss_of(weights, state, x, remat):
        def tower(x):
            return jnp.tanh(x @ weights)

        tower = jax.checkpoint(tower) if remat == "tower" else tower
        return handler.update_cache_and_compute_loss(
            state, lambda data: tower(data["x"]), x, tower(x), {"x": x}
        )

    for remat in ("nothing", "tower", "step"):
        loss = functools.partial(loss_of, remat=remat)
        loss = jax.checkpoint(loss) if remat == "step" else loss
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        state, history = handler.init(jax.random.key(0)), []
        for seed in range(3):
            (value, state), gradient = step(jnp.eye(WIDTH, dtype=jnp.float32), state, batch(seed))
            history += [value, gradient]
        results.append(history + jax.tree.leaves(state.caches))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_two_handlers_in_one_torch_model_keep_apart():
    """One backward pass through both; each does what it does alone."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower_of().eval()
            self.first = handler_of(negcache_torch, 1, estimator="shared")
            self.second = handler_of(negcache_torch, 2)

    model = Model()
    one = handler_of(negcache_torch, 1, estimator="shared")
    two = handler_of(negcache_torch, 2)
    for seed in range(4):
        both = torch_step(model.first, model.tower, seed)
        both = both + torch_step(model.second, model.tower, seed + 10)
        alone = torch_step(one, model.tower, seed), torch_step(two, model.tower, seed + 10)
        gradients = (torch.autograd.grad(each, model.tower.parameters()) for each in alone)
        ours = torch.autograd.grad(both, model.tower.parameters())
        for each, *parts in zip(ours, *gradients, strict=True):
            torch.testing.assert_close(each, sum(parts))
    state = model.state_dict()
    for name, handler in (("first.", one), ("second.", two)):
        own = {key.removeprefix(name): v for key, v in state.items() if key.startswith(name)}
        assert_same(own, handler.state_dict())
    other = Model()
    other.load_state_dict(state)
    assert_same(other.state_dict(), state)


def test_two_handlers_in_one_tensorflow_model_keep_apart(tmp_path):
    weights = tf.Variable(np.eye(WIDTH, dtype=np.float32))

    class Model(tf.Module):
        def __init__(self):
            super().__init__()
            self.first = handler_of(negcache_tensorflow, 1)
            self.second = handler_of(negcache_tensorflow, 2)

    def loss_of(handler, x):
        return handler.update_cache_and_compute_loss(
            lambda data: data["x"] @ weights, x, x @ weights, {"x": x}
        )

    model, apart = Model(), Model()
    for seed in range(3):
        one, two = tf.constant(batch(seed)), tf.constant(batch(seed + 10))
        with tf.GradientTape() as tape:
            both = loss_of(model.first, one) + loss_of(model.second, two)
        ours, parts = tape.gradient(both, weights), []
        for handler, x in ((apart.first, one), (apart.second, two)):
            with tf.GradientTape() as tape:
                loss = loss_of(handler, x)
            parts.append(tape.gradient(loss, weights))
        np.testing.assert_allclose(ours, sum(parts), rtol=1e-5, atol=1e-6)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "both"))
    other = Model()
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    for name in ("first", "second"):
        for twin in (apart, other):
            for ours, theirs in zip(
                getattr(model, name).variables, getattr(twin, name).variables, strict=True
            ):
                np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    assert (model.first.cache.data["x"].numpy() != model.second.cache.data["x"].numpy()).any()


LOADED = """
import queue, threading
import torch
import negcache_torch as negcache

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, seed):
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))

def prefetched():
    waiting = queue.Queue(2)
    thread = threading.Thread(target=lambda: [waiting.put(Data()[seed]) for seed in range(6)])
    thread.start()
    for _ in range(6):
        yield waiting.get(timeout=60)
    thread.join()

def forked():
    return torch.utils.data.DataLoader(
        Data(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)

specs = {key: negcache.FieldSpec((4,), "float32") for key in ("x", "e")}
states = []
for loader in (lambda: map(Data().__getitem__, range(6)), prefetched, forked):
    handler = negcache.CacheLossHandler(
        negcache.CacheManager(specs, 20),
        negcache.CacheClassificationLoss("e", ("x",), generator=0),
        embedding_key="e", data_keys=("x",))
    torch.manual_seed(0)
    tower = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(tower.parameters(), 0.1)
    network = lambda data: tower(data["x"])
    for x in loader():
        loss = handler.update_cache_and_compute_loss(network, x, network({"x": x}), {"x": x})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    states.append({**handler.state_dict(), **tower.state_dict()})
for other in states[1:]:
    assert all(torch.equal(value, states[0][key]) for key, value in other.items())
print("the same training")
"""


def test_batches_made_by_threads_and_worker_processes_are_the_same_training():
    """In a process of its own: forking one in which other frameworks run is not safe."""
    out = programs.run("-c", LOADED)
    assert out.stdout.strip() == "the same training"


def test_another_thread_may_read_and_save_between_steps():
    handler, tower = handler_of(negcache_torch), tower_of().eval()
    asked, saved = queue.Queue(), queue.Queue()

    def save():
        while asked.get(timeout=60):
            file = io.BytesIO()
            torch.save(handler.state_dict(), file)
            saved.put((file, int((handler.cache.age == 0).sum())))

    thread = threading.Thread(target=save)
    thread.start()
    for seed in range(3):
        torch_step(handler, tower, seed)
        asked.put(True)  # noqa: FBT003 - go on
        file, young = saved.get(timeout=60)
        file.seek(0)
        assert_same(torch.load(file, weights_only=True), handler.state_dict())
        assert young == int((handler.cache.age == 0).sum())
    asked.put(False)  # noqa: FBT003 - stop
    thread.join()


@pytest.mark.parametrize("name", ["torch", "tensorflow"])
def test_two_handlers_train_in_two_threads_at_once(name):
    """Bit for bit as one after the other: nothing is shared between them."""

    def train(module, seed, ready):
        handler = handler_of(module, seed)
        native = module.CacheLossHandler.backend.to_array
        ready.wait(60)
        losses = []
        for step in range(steps):
            x = native(batch(100 * seed + step))
            loss = handler.update_cache_and_compute_loss(
                lambda data: 2.0 * data["x"], x, 2.0 * x, {"x": x}
            )
            losses.append(loss.numpy())
        cache = handler.cache
        return [*losses, *(each.numpy() for each in (cache.age, *cache.data.values()))]

    module, steps = {"torch": (negcache_torch, 20), "tensorflow": (negcache_tensorflow, 4)}[name]
    found, ready = {}, threading.Barrier(2)

    def keep(seed):
        found[seed] = train(module, seed, ready)

    threads = [threading.Thread(target=keep, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        alone = train(module, seed, threading.Barrier(1))
        for ours, theirs in zip(found[seed], alone, strict=True):
            np.testing.assert_array_equal(ours, theirs)

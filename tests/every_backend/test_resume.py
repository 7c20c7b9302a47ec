"""A run that is killed, and resumed in another process, is the run that was never stopped.

Bit for bit.

As a script: `python test_resume.py BACKEND FOLDER`, the process that is killed.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STEPS, KILLED_AT = 7, 4
WIDTH, CAPACITY, ROWS = 3, 6, 2


def batch(step):
    rng = np.random.default_rng(step)
    return (rng.standard_normal((ROWS, WIDTH)).astype("float32") for _ in range(2))


class NumpyRun:
    """A training run: `step`, `arrays` (all that must be equal), and each way to `save` and `load`.

    NumPy has no gradients: its tower stands still.
    """

    ways = ("handler",)

    def __init__(self):
        import negcache_core as negcache  # noqa: PLC0415 - each process imports one library

        self.handler = self.handler_of(negcache, np.float32, generator=5)

    def handler_of(self, negcache, dtype, **drawing):
        spec = negcache.FieldSpec((WIDTH,), dtype)
        loss = negcache.CacheClassificationLoss(
            "embedding", ("x",), num_samples=2, max_staleness=0.2, **drawing
        )
        manager = negcache.CacheManager({"x": spec, "embedding": spec}, CAPACITY)
        return negcache.CacheLossHandler(manager, loss, "embedding", ("x",))

    def step(self, number):
        query, x = batch(number)
        network = lambda features: features["x"] * 2.0  # noqa: E731
        return self.handler.update_cache_and_compute_loss(
            network, query, network({"x": x}), {"x": x}
        )

    def arrays(self):
        cache = self.handler.cache
        window = self.handler._store.read().window
        draw = self.handler.cache_loss.generator.random(1)
        return [*cache.data.values(), cache.age, window, draw]

    def save(self, way, folder):
        del way
        self.handler.save(folder / "cache")

    def load(self, way, folder):
        del way
        self.handler.load(folder / "cache")


class TorchRun(NumpyRun):
    """A Linear tower with Adam; the handler in the model's state_dict, or in a file of its own."""

    ways = ("handler", "state_dict")

    def __init__(self):
        import negcache_torch as negcache  # noqa: PLC0415
        import torch  # noqa: PLC0415

        torch.manual_seed(0)
        self.torch, self.tower = torch, torch.nn.Linear(WIDTH, WIDTH)
        self.handler = self.handler_of(negcache, torch.float32)
        self.optimizer = torch.optim.Adam(self.tower.parameters(), 0.1)

    def step(self, number):
        query, x = map(self.torch.as_tensor, batch(number))
        network = lambda features: self.tower(features["x"])  # noqa: E731
        step = self.handler.update_cache_and_compute_loss
        loss = step(network, query, network({"x": x}), {"x": x})
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def arrays(self):
        return [*self.handler.state_dict().values(), self.tower.weight.detach()]

    def save(self, way, folder):
        from negcache_core.files import replacing  # noqa: PLC0415

        state = {"tower": self.tower.state_dict(), "optimizer": self.optimizer.state_dict()}
        if way == "handler":
            super().save(way, folder)
        else:
            state["handler"] = self.handler.state_dict()
        with replacing(folder / way) as partial:
            self.torch.save(state, partial)

    def load(self, way, folder):
        state = self.torch.load(folder / way, weights_only=True)
        self.tower.load_state_dict(state["tower"])
        self.optimizer.load_state_dict(state["optimizer"])
        if way == "handler":
            super().load(way, folder)
        else:
            self.handler.load_state_dict(state["handler"])


class TensorflowRun(NumpyRun):
    """A matrix trained by Keras's Adam under tf.function; the handler in a tf.train.Checkpoint."""

    ways = ("handler", "checkpoint")

    def __init__(self):
        import negcache_tensorflow as negcache  # noqa: PLC0415
        import tensorflow as tf  # noqa: PLC0415

        tf.random.set_seed(0)
        self.tf, self.tower = tf, tf.Variable(tf.random.normal((WIDTH, WIDTH), seed=1))
        self.handler = self.handler_of(negcache, tf.float32)
        self.optimizer = tf.keras.optimizers.Adam(0.1)
        self.optimizer.build([self.tower])
        self.traced = tf.function(self.train, autograph=False)

    def train(self, query, x):
        network = lambda features: features["x"] @ self.tower  # noqa: E731
        with self.tf.GradientTape() as tape:
            step = self.handler.update_cache_and_compute_loss
            loss = step(network, query, network({"x": x}), {"x": x})
        self.optimizer.apply_gradients([(tape.gradient(loss, self.tower), self.tower)])
        return loss

    def step(self, number):
        return self.traced(*map(self.tf.constant, batch(number)))

    def arrays(self):
        return [variable.numpy() for variable in (*self.handler.variables, self.tower)]

    def checkpoint(self, way):
        handler = {"handler": self.handler} if way == "checkpoint" else {}
        return self.tf.train.Checkpoint(tower=self.tower, optimizer=self.optimizer, **handler)

    def save(self, way, folder):
        if way == "handler":
            super().save(way, folder)
        self.checkpoint(way).write(str(folder / way))

    def load(self, way, folder):
        self.checkpoint(way).read(str(folder / way)).assert_consumed()
        if way == "handler":
            super().load(way, folder)


class JaxRun(NumpyRun):
    """A matrix trained by optax's Adam in a donating jit; saved by Orbax, and by plain NumPy."""

    ways = ("handler", "orbax", "npz")

    def __init__(self):
        import jax  # noqa: PLC0415
        import negcache_jax as negcache  # noqa: PLC0415
        import optax  # noqa: PLC0415

        self.jax, self.optimizer = jax, optax.adam(0.1)
        self.handler = self.handler_of(negcache, "float32")
        params = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH))
        state = self.handler.init(jax.random.PRNGKey(2))
        self.run = (params, self.optimizer.init(params), state)
        self.jitted = jax.jit(self.train, donate_argnums=0)

    def train(self, run, query, x):
        params, optimizer_state, state = run

        def loss_of(params):
            network = lambda features: features["x"] @ params  # noqa: E731
            step = self.handler.update_cache_and_compute_loss
            return step(state, network, query, network({"x": x}), {"x": x})

        (loss, state), gradient = self.jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, optimizer_state = self.optimizer.update(gradient, optimizer_state)
        return loss, (params + updates, optimizer_state, state)

    def step(self, number):
        loss, self.run = self.jitted(self.run, *batch(number))
        return loss

    def arrays(self):
        return self.jax.tree.leaves(self.run)

    def save(self, way, folder):
        params, optimizer_state, state = self.run
        if way == "orbax":
            import orbax.checkpoint as ocp  # noqa: PLC0415

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "orbax", self.run)
            return
        saved = self.run
        if way == "handler":
            self.handler.save(state, folder / "cache")
            saved = (params, optimizer_state)
        with (folder / f"{way}.npz").open("wb") as file:
            np.savez(file, *self.jax.tree.leaves(saved))

    def load(self, way, folder):
        params, optimizer_state, state = self.run
        if way == "orbax":
            import orbax.checkpoint as ocp  # noqa: PLC0415

            with ocp.StandardCheckpointer() as checkpointer:
                self.run = checkpointer.restore(folder / "orbax", self.run)
            return
        like = self.run if way == "npz" else (params, optimizer_state)
        with np.load(folder / f"{way}.npz", allow_pickle=False) as file:
            leaves = [self.jax.numpy.asarray(file[key]) for key in file.files]
        self.run = self.jax.tree.unflatten(self.jax.tree.structure(like), leaves)
        if way == "handler":
            self.run = (*self.run, self.handler.load(state, folder / "cache"))


RUNS = {"numpy": NumpyRun, "torch": TorchRun, "tensorflow": TensorflowRun, "jax": JaxRun}


def trace_of(run, steps):
    """Run steps and return after each the loss, exactly, and a digest of all state."""
    found = []
    for number in steps:
        loss = float(run.step(number)).hex()
        bits = b"".join(np.asarray(array).tobytes() for array in run.arrays())
        found.append([loss, hashlib.sha256(bits).hexdigest()])
    return found


def first(make, folder):
    """Run all steps; run some, save, go on, and die in the middle of the next save."""
    straight = trace_of(make(), range(STEPS))
    run = make()
    assert trace_of(run, range(KILLED_AT)) == straight[:KILLED_AT]
    for way in run.ways:
        run.save(way, folder)
    run.step(99)
    (folder / "straight.json").write_text(json.dumps(straight[KILLED_AT:]))

    from negcache_core import files  # noqa: PLC0415

    def die(arrays, path, metadata):
        save_file(arrays, path, metadata=metadata)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    save_file, files.save_file = files.save_file, die
    run.save("handler", folder)


def second(make, folder):
    """Load what was saved before the kill, each way, and run the rest; yield what is found."""
    for way in make.ways:
        run = make()
        run.step(98)  # whatever came before is gone
        run.load(way, folder)
        yield way, trace_of(run, range(KILLED_AT, STEPS))


@pytest.mark.parametrize("backend", RUNS)
def test_a_killed_run_goes_on_bit_for_bit(backend, tmp_path):
    killed = subprocess.run(
        [sys.executable, "-W", "error", __file__, backend, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_ENABLE_X64": "1"},  # as here
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list(tmp_path.glob(".cache.*.partial"))) == 1  # half of a file, under another name
    straight = json.loads((tmp_path / "straight.json").read_text())
    assert len(straight) == STEPS - KILLED_AT
    assert len({digest for _, digest in straight}) == len(straight)
    ways = []
    for way, trace in second(RUNS[backend], tmp_path):
        assert trace == straight, way
        ways.append(way)
    assert tuple(ways) == RUNS[backend].ways


if __name__ == "__main__":
    _, backend, folder = sys.argv
    first(RUNS[backend], Path(folder))

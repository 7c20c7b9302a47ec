"""Train docstring search in plain JAX on a mesh, with sharded batch, cache and weights.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python examples/jax_sharded.py
    … python examples/jax_sharded.py --whole-weights
    … python examples/jax_sharded.py --resume runs/jax_sharded/step_200

It uses all devices that JAX finds: two virtual ones here. Weights and Adam's state are sharded too,
and gathered for each step; --whole-weights keeps them whole on every device.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import optax
import orbax.checkpoint as ocp
from curves import Panel, draw
from docstring_pairs import BUCKETS, ITEM_WORDS, PADDING, Data, as_data, batches, mine_pairs
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

OUT = Path(__file__).resolve().parents[1] / "runs" / "jax_sharded"
OPTIMIZER = optax.adam(3e-3)

Weights = dict[str, Array]


def embed(weights: Weights, tower: str, tokens: Array) -> Array:
    """Map token ids (n, words) to unit embeddings (n, width), with the "query" or "item" tower."""
    factors = jnp.exp(weights[tower][tokens]) * (tokens != PADDING)
    total = jnp.einsum("nt,ntd->nd", factors, weights["vectors"][tokens])
    return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def make_loss(cache_size: int, width: int) -> negcache.NegativeCacheLoss:
    """Return the loss; its cache is sharded over the mesh's axis "data"."""
    return negcache.NegativeCacheLoss(
        cache_size,
        features={"tokens": negcache.FieldSpec((ITEM_WORDS,), jnp.int32)},
        embedding=width,
        scale=20.0,
        labels={"id": negcache.FieldSpec((), jnp.int32)},
        id_keys=("id",),
        group="data",
    )


class State(NamedTuple):
    """All that a run needs to resume, as a pytree; or the sharding of each array in it."""

    weights: Any
    optimizer: Any
    cache: Any
    step: Any


def init(loss_fn: negcache.NegativeCacheLoss, width: int) -> State:
    """Return the initial state."""
    first, second = jax.random.split(jax.random.PRNGKey(0))
    weights = {
        "vectors": 0.1 * jax.random.normal(first, (BUCKETS, width)),
        "query": jnp.zeros(BUCKETS),
        "item": jnp.zeros(BUCKETS),
    }
    return State(weights, OPTIMIZER.init(weights), loss_fn.init(second), jnp.int32(0))


def shardings(
    loss_fn: negcache.NegativeCacheLoss, width: int, mesh: Mesh | AbstractMesh, *, whole: bool
) -> State:
    """Return the sharding of each array of a state: weights are split by rows, unless `whole`."""
    shapes = jax.eval_shape(functools.partial(init, loss_fn, width))

    def place(array: Any) -> NamedSharding:
        return NamedSharding(mesh, P() if whole or not array.ndim else P("data"))

    weights, optimizer = jax.tree.map(place, (shapes.weights, shapes.optimizer))
    return State(weights, optimizer, loss_fn.shardings(mesh), NamedSharding(mesh, P()))


def make_train_step(
    loss_fn: negcache.NegativeCacheLoss, places: State, mesh: Mesh
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """Return the compiled step, from a state and a batch to the next state and the metrics."""

    # One device: its part of the batch, its shard of the cache, and all weights.
    def loss_of(
        weights: Weights, cache: negcache.HandlerState, query: Array, features: dict[str, Array]
    ) -> tuple[Array, Any]:
        bound = loss_fn.bind(cache)
        queries = embed(weights, "query", query)
        retrieval = bound.retrieve(queries, features)
        positive = embed(weights, "item", features["tokens"])
        negative = embed(weights, "item", retrieval.features["tokens"])
        result = bound.compute_loss(queries, positive, negative, retrieval)
        bound.commit(result, positive, features)
        metrics = {key: jax.lax.pmean(value, "data") for key, value in result.metrics.items()}
        return jax.lax.pmean(result.loss, "data"), (bound.state, metrics)

    # The gradient of the mean over devices: JAX sums each device's part.
    on_mesh = jax.shard_map(
        jax.value_and_grad(loss_of, has_aux=True),
        mesh=mesh,
        in_specs=(P(), loss_fn.specs(), P("data"), P("data")),
        out_specs=((P(), (loss_fn.specs(), P())), P()),
    )

    # All devices: sharded weights are gathered for the step, and each shard is updated in place.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def train_step(
        state: State, query: Array, features: dict[str, Array]
    ) -> tuple[State, dict[str, Array]]:
        (loss, (cache, metrics)), gradient = on_mesh(state.weights, state.cache, query, features)
        updates, optimizer = OPTIMIZER.update(gradient, state.optimizer)
        weights = optax.apply_updates(state.weights, updates)
        return State(weights, optimizer, cache, state.step + 1), {"loss": loss, **metrics}

    return train_step


@jax.jit
def embeddings(weights: Weights, data: Data) -> tuple[Array, Array]:
    """Return the embeddings of the held-out queries, and of all items."""
    item = functools.partial(embed, weights, "item")
    items = jax.lax.map(lambda row: item(row[None])[0], data.items, batch_size=256)
    return embed(weights, "query", data.queries[data.held_out]), items


def evaluate(weights: Weights, data: Data) -> tuple[float, float]:
    """Return MRR and recall@10 of the held-out queries among all items."""
    queries, items = map(np.asarray, embeddings(weights, jax.tree.map(jnp.asarray, data)))
    scores = queries @ items.T
    rank = (~(scores < np.take_along_axis(scores, data.answers, axis=1))).sum(axis=1)
    return float((1 / rank).mean()), float((rank <= 10).mean())


class Run:
    """A state on a mesh of all devices, and its step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        loss_fn = make_loss(options.cache_size, options.width)
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        places = shardings(loss_fn, options.width, mesh, whole=options.whole_weights)
        make = functools.partial(init, loss_fn, options.width)
        self.state: State = jax.jit(make, out_shardings=places)()
        self.train_step = make_train_step(loss_fn, places, mesh)
        self.parts = NamedSharding(mesh, P("data"))
        self.curve: list[tuple[int, float, float]] = []

    def save(self, folder: Path) -> None:
        """Write a checkpoint of all shards."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(
                folder.resolve(), self.state, force=True
            )  # over that of an earlier run

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint, bit for bit."""
        with ocp.StandardCheckpointer() as checkpointer:
            self.state = checkpointer.restore(folder.resolve(), self.state)

    def train(self, data: Data) -> None:
        """Train until step `options.steps`."""
        options, begun = self.options, int(self.state.step)
        rows = batches(data.train, options.steps, options.batch_size)
        bar = tqdm(range(begun + 1, options.steps + 1), unit="step")
        self.curve.append((begun, *evaluate(self.state.weights, data)))
        for step in bar:
            ids = data.item_of[rows[step - 1]]
            features = {"tokens": data.items[ids], "id": ids.astype(np.int32)}
            batch = jax.device_put((data.queries[rows[step - 1]], features), self.parts)
            self.state, metrics = self.train_step(self.state, *batch)
            if step % options.eval_every == 0:
                self.curve.append((step, *evaluate(self.state.weights, data)))
                bar.set_postfix({key: f"{metrics[key]:.3f}" for key in ("loss", "staleness")})
            if step % options.save_every == 0:
                self.save(options.out / f"step_{step}")


def megabytes(shapes: Any, places: Any) -> float:
    """Return how much one device holds of arrays with these shardings."""
    sizes = jax.tree.map(
        lambda array, place: math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize,
        shapes,
        places,
    )
    return sum(jax.tree.leaves(sizes)) / 1e6


def picture(run: Run, path: Path) -> None:
    """Plot the search quality by step, and the memory per device by the number of devices."""
    steps, mrr, recall = zip(*run.curve, strict=True)
    options, counts = run.options, (1, 2, 4, 8)
    loss_fn = make_loss(options.cache_size, options.width)
    shapes = jax.eval_shape(functools.partial(init, loss_fn, options.width))
    lines: dict[str, list[float]] = {
        "weights and Adam, whole": [],
        "in shards": [],
        "cache": [],
    }
    for count in counts:
        mesh = AbstractMesh((count,), ("data",), axis_types=(AxisType.Auto,))
        for name, whole in (
            ("weights and Adam, whole", True),
            ("in shards", False),
        ):
            places = shardings(loss_fn, options.width, mesh, whole=whole)
            lines[name].append(megabytes(shapes[:2], places[:2]))
        lines["cache"].append(megabytes(shapes.cache, places.cache))
    panels = [
        Panel("held-out queries", {"MRR": (steps, mrr), "recall@10": (steps, recall)}),
        Panel(
            "MB on one device",
            {name: (counts, line) for name, line in lines.items()},
            "devices",
        ),
    ]
    draw(panels, path)


def main(arguments: Sequence[str] | None = None) -> Run:
    """Mine, train, evaluate, plot."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64, help="over all devices")
    parser.add_argument("--cache-size", type=int, default=4_096, help="over all devices")
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--whole-weights", action="store_true", help="on every device")
    parser.add_argument("--max-pairs", type=int, default=6_000, help="stop mining after this many")
    parser.add_argument("--eval-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to resume from")
    parser.add_argument("--out", type=Path, default=OUT, help="for checkpoints")
    parser.add_argument("--picture", type=Path, help="default: curves.svg in --out")
    options = parser.parse_args(arguments)
    data, run = as_data(mine_pairs(options.max_pairs)), Run(options)
    if options.resume:
        run.load(options.resume)
    run.train(data)
    path = options.picture or options.out / "curves.svg"
    picture(run, path)
    print(f"{len(data.held_out)} held-out queries among {len(data.items):,} items,", end=" ")
    print(f"{jax.device_count()} devices:")
    for step, mrr, recall in (run.curve[0], run.curve[-1]):
        print(f"step {step}: MRR {mrr:.3f}, recall@10 {recall:.3f}")
    print(f"plot saved to {path}")
    return run


if __name__ == "__main__":
    main()

"""Train the docstring search in JAX: two towers in Flax NNX, optax, Orbax, and the cache's state.

python examples/nnx_search.py
python examples/nnx_search.py --resume runs/nnx_search/step_500 --steps 2000
tensorboard --logdir runs/nnx_search
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import negcache_jax as negcache
import numpy as np
import optax
import orbax.checkpoint as ocp
from docstring_pairs import BUCKETS, ITEM_WORDS, PADDING, Data, as_data, batches, mine_pairs
from flax import nnx
from jax import Array
from tensorboard.summary import Writer
from tqdm import tqdm

OUT = Path(__file__).resolve().parents[1] / "runs" / "nnx_search"


class Towers(nnx.Module):
    """Two towers of hashed bags of words, which share their words' vectors.

    An embedding is the normalised sum of a text's word vectors, by the tower's own weights.
    """

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        normal, zeros = nnx.initializers.normal(0.1), nnx.initializers.zeros_init()
        self.vectors = nnx.Embed(BUCKETS, width, embedding_init=normal, rngs=rngs)
        self.query_log_weights = nnx.Embed(BUCKETS, 1, embedding_init=zeros, rngs=rngs)
        self.item_log_weights = nnx.Embed(BUCKETS, 1, embedding_init=zeros, rngs=rngs)

    def embed_queries(self, tokens: Array) -> Array:
        """Map token ids (n, words) to embeddings (n, width) of length 1."""
        return self._embed(tokens, self.query_log_weights)

    def embed_items(self, tokens: Array) -> Array:
        """Map token ids (n, words) to embeddings (n, width) of length 1."""
        return self._embed(tokens, self.item_log_weights)

    def _embed(self, tokens: Array, log_weights: nnx.Embed) -> Array:
        weights = jnp.exp(log_weights(tokens)) * (tokens != PADDING)[:, :, None]
        total = jnp.sum(weights * self.vectors(tokens), axis=1)
        return total / jnp.linalg.norm(total, axis=1, keepdims=True)


def make_loss(cache_size: int, width: int) -> negcache.NegativeCacheLoss:
    """Return the loss; its state is separate."""
    return negcache.NegativeCacheLoss(
        cache_size,
        features={"tokens": negcache.FieldSpec((ITEM_WORDS,), jnp.int32)},
        embedding=width,
        scale=20.0,
        labels={"id": negcache.FieldSpec((), jnp.int32)},
        id_keys=("id",),
    )


def make_train_step(loss_fn: negcache.NegativeCacheLoss) -> Callable[..., Any]:
    """Return the compiled step: it trains the towers, and returns the next state and metrics."""

    # The state is donated, so that the cache is written in place.
    @nnx.jit(donate_argnames="state")
    def train_step(
        towers: Towers,
        optimizer: nnx.Optimizer,
        state: negcache.HandlerState,
        query_tokens: Array,
        features: dict[str, Array],
    ) -> tuple[negcache.HandlerState, dict[str, Array]]:
        def loss_of(towers: Towers) -> tuple[Array, Any]:
            bound = loss_fn.bind(state)
            query = towers.embed_queries(query_tokens)
            retrieval = bound.retrieve(query, features)
            tokens = jnp.concatenate([features["tokens"], retrieval.features["tokens"]])
            items = towers.embed_items(tokens)  # positives and negatives together
            positive, negative = items[: len(query)], items[len(query) :]
            result = bound.compute_loss(query, positive, negative, retrieval)
            bound.commit(result, positive, features)
            return result.loss, (bound.state, {"loss": result.loss, **result.metrics})

        (_, (state, metrics)), gradient = nnx.value_and_grad(loss_of, has_aux=True)(towers)
        optimizer.update(towers, gradient)
        return state, metrics

    return train_step


@nnx.jit
def ranks(towers: Towers, data: Data) -> Array:
    """Return the rank of each held-out query's item among all items; 1 is best."""
    items = jax.lax.map(lambda row: towers.embed_items(row[None])[0], data.items, batch_size=256)
    scores = towers.embed_queries(data.queries[data.held_out]) @ items.T
    own = jnp.take_along_axis(scores, data.answers, axis=1)
    return (~(scores < own)).sum(axis=1)


def evaluate(towers: Towers, data: Data) -> tuple[float, float]:
    """Return MRR and recall@10 of the held-out queries among all items."""
    rank = np.asarray(ranks(towers, jax.tree.map(jnp.asarray, data)))
    return float((1 / rank).mean()), float((rank <= 10).mean())


class Run:
    """Everything that a run resumes from: towers, optimizer, the cache's state, and the step."""

    def __init__(self, cache_size: int, width: int) -> None:
        loss_fn = make_loss(cache_size, width)
        self.towers = Towers(width, nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.towers, optax.adam(3e-3), wrt=nnx.Param)
        # An integer array: not all Orbax releases can save the newer kind of key.
        self.state, self.step = loss_fn.init(jax.random.PRNGKey(1)), 0
        self.train_step = make_train_step(loss_fn)
        self.loss_fn, self.history = loss_fn, {}  # for the picture

    def arrays(self) -> dict[str, Any]:
        """Return the state as a pytree of arrays."""
        models = {"towers": nnx.state(self.towers), "optimizer": nnx.state(self.optimizer)}
        return {**models, "cache": self.state, "step": np.asarray(self.step)}

    def save(self, folder: Path) -> None:
        """Write a checkpoint; if the process dies, it is complete or absent."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, self.arrays(), force=True)  # in place of an older run's

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint, bit for bit."""
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(folder, self.arrays())
        nnx.update(self.towers, saved["towers"])
        nnx.update(self.optimizer, saved["optimizer"])
        self.state, self.step = saved["cache"], int(saved["step"])

    def draw(self, path: Path) -> None:
        """Save a picture of the cache, and of how many negatives competed."""
        handler = self.loss_fn.bind(self.state)
        figure = negcache.plot_cache(
            handler, lambda features: self.towers.embed_items(features["tokens"]), self.history
        )
        figure.savefig(path)

    def train(self, data: Data, options: argparse.Namespace) -> None:
        """Train up to `options.steps`, with a log for TensorBoard."""
        log = Writer(str(options.out / "log"))
        # All batches have one size: another one would be compiled again.
        rows = batches(data.train, options.steps, options.batch_size)
        for step in tqdm(range(self.step, options.steps), desc="training", unit="step"):
            ids = data.item_of[rows[step]]
            features = {"tokens": data.items[ids], "id": ids.astype(np.int32)}
            self.state, metrics = self.train_step(
                self.towers, self.optimizer, self.state, data.queries[rows[step]], features
            )
            self.step = step + 1
            if self.step % options.log_every == 0:
                for name, value in metrics.items():
                    log.add_scalar(name, value, self.step)
                self.history[self.step] = metrics
            if self.step % options.save_every == 0:
                self.save(options.out / f"step_{self.step}")
        log.close()


def main(arguments: Sequence[str] | None = None) -> Run:
    """Mine, train, and evaluate before and after."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cache-size", type=int, default=4_096)
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--max-pairs", type=int, default=6_000, help="mine at most this many pairs")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to resume from")
    parser.add_argument("--out", type=Path, default=OUT, help="for logs, checkpoints, a picture")
    options = parser.parse_args(arguments)

    data = as_data(mine_pairs(options.max_pairs))
    run = Run(options.cache_size, options.width)
    if options.resume:
        run.load(options.resume.resolve())
    before = evaluate(run.towers, data)
    run.train(data, options)
    after = evaluate(run.towers, data)
    run.draw(options.out / "cache.svg")
    print(f"{len(data.held_out)} held-out queries among {len(data.items):,} items, before:")
    print("MRR {:.3f}, recall@10 {:.3f}; after:".format(*before))
    print("MRR {:.3f}, recall@10 {:.3f}".format(*after))
    return run


if __name__ == "__main__":
    main()

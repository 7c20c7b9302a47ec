"""The example of plain JAX on a mesh of two devices: in shards or whole, resumed or not.

The number of devices is settled when JAX starts, so this file is also the program that tries it.
"""

import sys
from pathlib import Path

import programs

SIZES = {"width": 16, "cache-size": 64, "batch-size": 8, "max-pairs": 200, "steps": 4}
EVERY = {"eval-every": 2, "save-every": 2}


def test_a_run_in_shards_is_that_with_whole_weights_and_goes_on(tmp_path):
    path = str(Path(__file__).parents[2] / "examples")
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {"XLA_FLAGS": flags, "PYTHONPATH": ":".join([path, *sys.path])}
    programs.run(__file__, tmp_path, timeout=600, JAX_ENABLE_X64="0", **environment)


def main(folder):
    import jax  # noqa: PLC0415 - in the program alone: the test itself needs no JAX
    import jax_sharded  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    def trained(out, *more):
        sizes = {**SIZES, **EVERY, "out": folder / out}
        words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
        return jax_sharded.main([*words, *more])

    def same(ours, theirs, check):
        jax.tree.map(check, *map(jax.device_get, (ours, theirs)))

    assert jax.device_count() == 2
    run = trained("shards")
    vectors, age = run.state.weights["vectors"], run.state.cache.caches["cache"].age
    for array in (vectors, age):
        assert array.addressable_shards[0].data.shape[0] == array.shape[0] // 2
    assert int((age < jax_sharded.negcache.EMPTY).sum()) == 4 * 8
    whole = trained("whole", "--whole-weights")
    assert whole.state.weights["vectors"].sharding.is_fully_replicated
    same(run.state, whole.state, lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4))

    last, curve = jax.device_get(run.state), run.curve
    run.load(folder / "shards" / "step_2")
    assert int(run.state.step) == 2
    data = jax_sharded.as_data(jax_sharded.mine_pairs(SIZES["max-pairs"]))
    run.curve = []
    run.train(data)
    same(run.state, last, np.testing.assert_array_equal)
    assert run.curve == curve[1:]

    # At rest: each step from the same weights.
    run.state = jax_sharded.Run(run.options).state
    first = jax.device_get((run.state.weights, run.state.optimizer))
    places = jax.tree.map(lambda array: array.sharding, (run.state.weights, run.state.optimizer))
    for row in jax_sharded.batches(data.train, 6, SIZES["batch-size"]):
        weights, optimizer = jax.device_put(first, places)
        state = run.state._replace(weights=weights, optimizer=optimizer)
        ids = data.item_of[row]
        features = {"tokens": data.items[ids], "id": ids.astype(np.int32)}
        batch = jax.device_put((data.queries[row], features), run.parts)
        run.state, metrics = run.train_step(state, *batch)
        assert float(metrics["staleness"]) < 1e-10
    assert float(metrics["fill"]) == 5 * 8 / 64  # before the last step's items came in


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Draw the pictures of the documentation from benchmarks/results and the tournament's kept results.

step_cost:        a step and the published algorithm over the bare product, by framework and size
memory:           a step's memory beyond the tables against capacity, beside the score matrix
results:          test MRR by batch, with a cache and without: the start page's
training_quality: test MRR of each way of training against encoder calls and against time
minilm_on_a_device: test MRR of each way of tuning MiniLM against seconds of a GPU
gradient_noise:   noise and bias of each estimator's gradient on a trained model
device_step:      on a GPU, a step over the bare bfloat16 product; device_step_jax: in JAX
device_memory:    on a GPU, a step's memory beyond the tables
keras_rs:         recall of examples/keras_rs_recommender.py by epoch, by its kept results

    python benchmarks/plot.py
    python benchmarks/plot.py --out /tmp --format png

Missing measurements are left out; a picture without any data is not drawn.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from _pictures_of_devices import step_memory, step_time
from _pictures_of_speed import memory, step_cost
from _pictures_of_training import (
    gradient_noise,
    keras_rs_recall,
    minilm_on_a_device,
    results,
    training_quality,
)
from _style import draw
from matplotlib.figure import Figure

PICTURES: dict[str, Callable[[], Figure | None]] = {
    "step_cost": step_cost,
    "memory": memory,
    "device_step": step_time("torch"),
    "device_step_jax": step_time("jax"),
    "device_memory": step_memory,
    "results": results,
    "training_quality": training_quality,
    "minilm_on_a_device": minilm_on_a_device,
    "gradient_noise": gradient_noise,
    "keras_rs": keras_rs_recall,
}


def main() -> None:
    """Draw every picture that there is data for."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    docs = Path(__file__).parents[1] / "docs"
    parser.add_argument("--out", type=Path, default=docs, help="folder, docs by default")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    for name, make in PICTURES.items():
        path = options.out / f"{name}.{options.format}"
        drawn = draw(make, path)
        print(f"written to {path}" if drawn else f"{name}: no results; see make bench, make gpu")


if __name__ == "__main__":
    main()

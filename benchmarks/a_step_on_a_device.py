"""Question: how long a whole step takes on a GPU, compared with bare products.

A step is retrieval, loss, backward and the update of the cache, with a tower that only looks rows
up, in PyTorch. The bare products are q @ cache.T in float32 and bfloat16, with their results in
memory. Times are medians by the device's own clock.

    python benchmarks/a_step_on_a_device.py --slots 131072 --width 128 --rows 64
    python benchmarks/a_step_on_a_device.py            # the whole grid: 8,388,608 slots, 60 GB
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _harness import save, table
from _steps_torch import Candidates

VOCABULARY = 50_000
SECONDS = 0.4  # for each candidate, after its warm-up


def timed(run: Callable[[], Any]) -> float:
    """Return the median milliseconds of a candidate."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1e3 * SECONDS and len(times) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(slots: int, width: int, rows: int) -> dict[str, Any]:
    """Return the times of one size."""
    torch.cuda.empty_cache()
    makers = Candidates(slots, width, rows, VOCABULARY)
    query = makers.query.detach()
    found: dict[str, Any] = {"slots": slots, "width": width, "rows": rows}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        handler = makers.full_handler(dtype)
        rows_ = handler.cache.data["embedding"]
        halved = query.to(dtype)
        product = timed(lambda halved=halved, rows_=rows_: halved @ rows_.T)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step = timed(makers.step(handler))
        found |= {
            f"product {name} ms": product,
            f"step {name} ms": step,
            f"MB of a step, {name}": (torch.cuda.max_memory_allocated() - held) / 1e6,
        }
        del handler, rows_
    return found


def main() -> None:
    """Measure each size, and print and save the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--slots", nargs="+", type=int, default=[131_072, 1_048_576, 8_388_608])
    parser.add_argument("--width", nargs="+", type=int, default=[128, 768])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 64, 512, 4_096])
    parser.add_argument("--precision", default="highest", help="of float32 products: or high")
    options = parser.parse_args()
    torch.set_default_device("cuda")
    torch.set_float32_matmul_precision(options.precision)
    results = []
    for size in itertools.product(options.slots, options.width, options.rows):
        try:
            results.append(measure(*size))
        except torch.cuda.OutOfMemoryError as error:
            print(size, "does not fit:", str(error).split(".", maxsplit=1)[0])
            continue
        print(json.dumps(results[-1]), flush=True)
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(results))
    save("a_step_on_a_device", results, same=("slots", "width", "rows"))


if __name__ == "__main__":
    main()

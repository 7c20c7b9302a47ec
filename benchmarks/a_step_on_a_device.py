"""Question: how long a whole step takes on a GPU, compared with bare products.

A step is retrieval, loss, backward pass and the update of the cache; the item tower only looks rows
up. It is run with the front door's defaults ("exact_query") and with those of the published code
("paper"); with rows of float32, bfloat16 and int8; with and without fused kernels; in eager code,
in a CUDA graph, and compiled. The bare products are q @ cache.T in float32, in TF32 and in
bfloat16, with their results in memory. "read" is the time to read the table once, at the speed of a
copy.

    python benchmarks/a_step_on_a_device.py torch --minutes 10
    python benchmarks/a_step_on_a_device.py jax --minutes 5
    python benchmarks/a_step_on_a_device.py torch --slots 131072 --width 128 --rows 64

Each result is written as it comes, one line of JSON, the most telling first. What cannot run is
written down with the reason: no memory, no such option, no such mode.
"""

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from _device_jobs import KEPT, MODES, ROWS, SLOTS, WIDTHS, Job, jobs, keep, sizes


def attempt(meter: Any, module: Any, job: Job) -> dict[str, Any]:
    """Return a job's figures, or why there are none."""
    try:
        return meter.measure(job)
    except module.NO_MEMORY as error:
        return {"error": f"does not fit: {_first(error)}"}
    except module.NOT_HERE as error:
        return {"error": f"not there: {type(error).__name__}: {_first(error)}"}
    except Exception as error:  # noqa: BLE001 - that it fails is a result, and others come after it
        return {"error": f"failed: {type(error).__name__}: {_first(error)}"}


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def main() -> None:
    """Measure until there is nothing left to measure, or no time."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("framework", choices=("torch", "jax"))
    parser.add_argument("--device", default="cuda", help="of PyTorch; JAX takes its first")
    parser.add_argument("--slots", nargs="+", type=int, default=SLOTS)
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of PyTorch")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after these")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each candidate")
    parser.add_argument("--out", type=Path, default=KEPT)
    options = parser.parse_args()
    module = importlib.import_module(f"_device_{options.framework}")
    meter = module.Meter(options.device, options.seconds)
    every = sizes(options.slots, options.width, options.rows)
    if options.framework == "torch":
        todo = jobs(every, options.modes)
    else:  # which has one mode, and no copy to measure the memory's speed by
        todo = [job for job in jobs(every, ("jit",)) if job.what != "read"]
    end = time.monotonic() + 60 * options.minutes
    print(f"{meter.name}, {meter.version}: {len(todo)} measurements", flush=True)
    for number, job in enumerate(todo):
        if time.monotonic() > end:
            print(f"the time is up: {len(todo) - number} measurements are left out")
            break
        found = attempt(meter, module, job)
        machine = {"device": meter.name, "framework": options.framework, "version": meter.version}
        keep(options.out, {**machine, **job.record(), **found})
        figure = found.get("error") or f"{found['ms']:.3g} ms"
        facts = (*job.size, job.what, job.storage, job.loss, job.mode, "fused" if job.fused else "")
        print(*filter(None, facts), "-", figure, flush=True)
        meter.clean()
    print("written to", options.out)


if __name__ == "__main__":
    main()

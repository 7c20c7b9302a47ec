"""Claim: in a step the host never waits for the device; what waits between steps is documented.

Steps of every kind, and what is done between steps, are run in PyTorch while each place is noted
where the host would wait: it reads a value, needs to know how many there are, or copies an array.

    python benchmarks/a_step_asks_the_device_for_nothing.py
    python benchmarks/a_step_asks_the_device_for_nothing.py --device cpu

On the CPU the adapter is told that it is on a device. The program fails if it finds a wait that is
not documented (docs/gpu.md).
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _harness import save, table
from _host_reads import Read, as_on_a_device, watched
from _kinds_of_steps import BETWEEN_STEPS, BY_ID, STEPS, TAKEN, Training, batches

from negcache_core import DTypeError, OptionError

DOCUMENTED = {
    "step 64, 128, 256, …": "looks whether the cache does harm, until it has warned once",
    "the first call under torch.no_grad()": "looks whether the cache is empty",
    "refresh()": "looks whether any row is written",
    "reset()": "copies the first state of the window",
    "resize()": "looks whether values can be read",
    "save()": "copies everything to the host",
    "load()": "copies everything to the device",
    "load_state_dict()": "looks for rows that are not finite",
    "print()": "reads ages and metrics",
    "diagnose()": "reads ages and metrics",
    "a metric as a number": "reads it",
    "a step of a cache in shards": "the host must know how many rows go where",
    "a step with use_cross_replica": "the host must know how many rows each rank has",
}
MAY_BE_MISSING = [name for name in STEPS if "fused" in name]  # kernels are not for every device
Found = list[Read] | str


def of_steps(device: torch.device, count: int = 2) -> Iterator[tuple[str, Found]]:
    """Yield each kind of step, and what was found in `count` of them, or why it does not run."""
    ids = batches(count, device)

    def run(name: str) -> list[Read]:
        step = STEPS[name](device)
        with watched() as found:
            for some in ids:
                step(some)
        return found

    for name in STEPS:
        if name not in MAY_BE_MISSING:
            yield name, run(name)
            continue
        try:
            yield name, run(name)
        except (DTypeError, OptionError, TypeError) as error:
            yield name, f"{type(error).__name__}: {error}"


def between_steps(device: torch.device, folder: Path) -> Iterator[tuple[str, Found]]:
    """Yield what is done between steps, and what was found while it was done."""
    with _one_rank(device):
        for name, doing in BETWEEN_STEPS.items():
            training = Training(device, **BY_ID)
            for ids in batches(TAKEN, device):
                training.step(ids)
            do = doing(training, folder)
            with watched() as found:
                do()
            yield name, found


def undocumented(name: str, found: Found) -> bool:
    """Return whether something was found that should not be there."""
    return bool(found) and not isinstance(found, str) and name not in DOCUMENTED


@contextlib.contextmanager
def _one_rank(device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rows(name: str, found: Found) -> list[dict[str, Any]]:
    if isinstance(found, str):
        return [{"what": name, "waits in": f"not run: {found}", "operation": None, "code": None}]
    if not found:
        return [{"what": name, "waits in": None, "operation": None, "code": None}]
    return [
        {
            "what": name,
            "waits in": f"{read.file}:{read.line} {read.function}",
            "operation": read.operation,
            "code": read.code,
        }
        for read in found
    ]


def main() -> None:
    """Look at everything, print and save what was found."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    pretending: Callable[[], Any] = contextlib.nullcontext
    if device.type == "cuda":
        for _ in of_steps(device):  # libraries set themselves up
            pass
    else:
        pretending = as_on_a_device
    with pretending(), tempfile.TemporaryDirectory() as folder:
        found = [*of_steps(device), *between_steps(device, Path(folder))]
    rows = [row for each in found for row in _rows(*each)]
    print(table([{key: row[key] for key in ("what", "waits in", "operation")} for row in rows]))
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    rows = [{"device": where, "torch": torch.__version__, **row} for row in rows]
    print("written to", save(f"host_reads_{device.type}", rows))
    wrong = [name for name, each in found if undocumented(name, each)]
    sys.exit(f"undocumented: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()

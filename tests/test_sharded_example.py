"""The example of a cache in shards runs under torchrun, and goes on with other numbers of ranks."""

import os
import sys
from pathlib import Path
from subprocess import run

EXAMPLE = Path(__file__).parent.parent / "examples" / "sharded_cache.py"


def torchrun(ranks, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run(
        [*launcher, f"--nproc-per-node={ranks}", str(EXAMPLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_trains_on_two_ranks_and_goes_on_with_one(tmp_path):
    sizes = ("--slots", 256, "--batch", 8, "--checkpoint", tmp_path / "checkpoint")
    first = torchrun(2, "--steps", 40, *sizes)
    assert "100% of 256 slots\n2 processes, 128 slots on this one\n" in first
    more = torchrun(1, "--steps", 1, *sizes)
    # One step of 8 rows fills no cache of 256 slots that was empty.
    assert "100% of 256 slots\n1 processes, 256 slots on this one, went on from a" in more
    assert "nan" not in first + more

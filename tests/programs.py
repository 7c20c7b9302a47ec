"""Programs that tests start: scripts, processes under torchrun, and cases of a test file itself."""

import os
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
# Two processes on two cores: more threads would wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*words, timeout=300, tail=5000, **environment):
    """Run Python with arguments; return what came of it, which is told where it failed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-tail:]
    return done


def torchrun(ranks, program, *arguments, **environment):
    """Run a program on several processes; it can import what tests share."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return run(
        *TORCHRUN,
        f"--nproc-per-node={ranks}",
        program,
        *arguments,
        timeout=600,
        tail=9000,
        **{**ONE_THREAD, "PYTHONPATH": path, **environment},
    )


def words_of(cases):
    """Return arguments for a program that ends in `main`: a function's name and arguments, each."""
    return [shlex.join(map(str, case)) for case in cases]


def main(functions, cases, told=lambda name: None):
    """Run all cases, also after one that fails, and say which ones failed."""
    failed = []
    for case in cases:
        name, *arguments = shlex.split(case)
        try:
            functions[name](*arguments)
            told(name)
        except Exception:  # noqa: BLE001 - told below
            traceback.print_exc(limit=-8)
            failed.append(case)
    sys.exit(f"failed: {failed}" if failed else 0)

"""The example of a cache in shards learns under torchrun, and goes on with fewer ranks."""

import re
from pathlib import Path

from programs import ONE_THREAD, run, torchrun

EXAMPLE = Path(__file__).parents[2] / "examples" / "sharded_cache.py"


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def train(ranks, *arguments):
    """Return the MRR before and after, and the line about processes and slots."""
    alone = ranks == 1
    done = (
        run(EXAMPLE, *arguments, **ONE_THREAD, **ALONE)
        if alone
        else torchrun(ranks, EXAMPLE, *arguments)
    )
    first, second = done.stdout.splitlines()
    assert "nan" not in first
    before, after = re.findall(r"MRR ([\d.]+), recall@10 [\d.]+", first)
    return float(before), float(after), second


def test_it_learns_on_two_ranks_and_goes_on_with_one(tmp_path):
    sizes = ("--slots", 256, "--batch", 8, "--width", 16, "--max-pairs", 300)
    sizes = (*sizes, "--checkpoint", tmp_path / "checkpoint")
    picture = tmp_path / "shard.svg"
    before, after, state = train(2, "--steps", 40, *sizes, "--picture", picture)
    assert "128 slots" in picture.read_text()
    assert after > 1.2 * before
    assert state == "2 processes, 128 slots on this one; 100% of 256 written"
    again, _, state = train(1, "--steps", 1, *sizes)
    assert again == after
    # One step of 8 rows fills no cache of 256 slots that was empty.
    written = "1 processes, 256 slots on this one; 100% of 256 written"
    assert state == f"{written}; resumed from step 40"

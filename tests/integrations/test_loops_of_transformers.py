"""The examples of transformers.Trainer and Accelerate go on bit for bit, on one process and two."""

from pathlib import Path

import pytest
from programs import torchrun

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


@pytest.fixture(scope="module")
def loops():
    """Import the examples late: whoever runs other tests need not wait for transformers."""
    import loops_ranks  # noqa: PLC0415 - late, as said above

    return loops_ranks


@pytest.mark.parametrize("name", ["trainer_search", "accelerate_search"])
def test_a_run_goes_on_from_its_checkpoint_and_logs_what_the_cache_says(loops, name, tmp_path):
    (example,) = [each for each in loops.EXAMPLES if each.__name__ == name]
    loops.assert_goes_on(example, tmp_path)
    assert (tmp_path / "whole" / "curves.svg").read_text().count("recall@10") > 0
    _, history = loops.trained(example, tmp_path / "still", **{"learning-rate": 0})
    staleness = [row["cache/staleness"] for row in history if "cache/staleness" in row]
    assert len(staleness) == 4
    assert max(staleness) < 1e-10


def test_two_processes_keep_one_cache_and_go_on_with_it(tmp_path):
    torchrun(2, Path(__file__).with_name("loops_ranks.py"), tmp_path)

"""The examples of the Trainer and of Accelerate, small; under torchrun on two processes."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import accelerate_search
import torch
import torch.distributed as dist
import trainer_search
from cached_towers import assert_same

SIZES = {"width": 16, "cache-size": 64, "batch-size": 3, "max-pairs": 200, "steps": 4}
EVERY = {"eval-every": 2, "save-every": 2, "log-every": 1}
EXAMPLES = {trainer_search: "checkpoint-2", accelerate_search: "step_2"}


def trained(example, out, **more):
    """Run an example; return all of its model that is trained and saved, and what it logged."""
    options = {**SIZES, **EVERY, "out": out, **more}
    done = example.main([word for key in options for word in (f"--{key}", str(options[key]))])
    if example is trainer_search:
        model, history = done.model, done.state.log_history
    else:
        model, history = done.accelerator.unwrap_model(done.model), done.progress.history
    return {key: value.clone() for key, value in model.state_dict().items()}, history


def assert_goes_on(example, folder):
    """A run through, and one from its middle, are the same; return the state."""
    whole, history = trained(example, folder / "whole")
    middle = EXAMPLES[example]
    again, more = trained(example, folder / "again", resume=folder / "whole" / middle)
    assert not (folder / "again" / middle).exists()  # it does not begin at the first step
    assert_same(again, whole)
    mrr = [(row["step"], row["eval_mrr"]) for row in history if "eval_mrr" in row]
    assert mrr == [(row["step"], row["eval_mrr"]) for row in more if "eval_mrr" in row]
    assert [step for step, _ in mrr] == [0, 2, 4]
    return whole


def main(folder):
    for example in EXAMPLES:
        state = assert_goes_on(example, folder / example.__name__)
        parts = [None, None]
        dist.all_gather_object(parts, {key: value.tolist() for key, value in state.items()})
        assert parts[0] == parts[1], example.__name__
        # What both brought: every batch of each, and nothing twice.
        ages = state["loss_fn.tables.cache_cache.age"]
        batches = 4 * (accelerate_search.ACCUMULATE if example is accelerate_search else 1)
        assert int((ages < torch.iinfo(torch.int32).max).sum()) == 2 * 3 * batches
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # what wraps the models still holds gloo's group: its end may hang


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Options of the loss, checked, and how many processes share it."""

import os
from typing import Any

import torch.distributed as dist
from negcache_torch import OptionError

CITATION = """
@inproceedings{lindgren2021negativecache,
    title = "Efficient Training of Retrieval Models using Negative Cache",
    author = "Lindgren, Erik and Reddi, Sashank and Guo, Ruiqi and Kumar, Sanjiv",
    booktitle = "Advances in Neural Information Processing Systems",
    volume = "34",
    year = "2021",
}
"""


def processes() -> int:
    """Return how many processes train together; raise if they are not joined yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError(
            "this is one of several processes, which are not joined yet: create the "
            "SentenceTransformerTrainingArguments, which join them, before the loss."
        )
    return 1


def checked_scale(scale: Any) -> float:
    """Return the scale; raise unless it is a number above 0."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise OptionError(f"scale is {scale!r}: expected a positive number.")
    return float(scale)

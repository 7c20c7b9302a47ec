"""PyTorch as the conformance kit wants it described, with no other framework: for ranks too."""

import pickle
import tempfile
from pathlib import Path

import negcache_torch
import torch
from ranks import run

from negcache_core.testing import Adapter


def _gradients(function, arrays, *constants):
    leaves = [array.clone().requires_grad_() for array in arrays]
    function(*leaves, *constants).backward()
    return [leaf.grad.numpy() for leaf in leaves]


def _on_ranks(count, function):
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), _keep_result, function, folder, ranks=count)
        files = (Path(folder) / str(rank) for rank in range(count))
        return [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 - our own


def _keep_result(rank, function, folder):
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(TORCH, rank)))


TORCH = Adapter(
    "torch",
    negcache_torch,
    torch.as_tensor,
    lambda tensor: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy(),
    gradients=_gradients,
    replicas=_on_ranks,
)

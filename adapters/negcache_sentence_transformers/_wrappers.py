"""Wrappers of a model: the trainer's, and those of other losses, which are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from negcache_torch import OptionError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_CUTS = (matryoshka.ForwardDecorator,)
_LAYERS = (adaptive_layer.ForwardDecorator, adaptive_layer.TransformerDecorator)


def bare(model: nn.Module) -> SentenceTransformer:
    """Return the model without the trainer's wrappers."""
    return next(each for each in model.modules() if isinstance(each, SentenceTransformer))


def parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel around a model, or None; inside, nothing is exchanged."""
    for each in model.modules():  # from the outside
        if isinstance(each, SentenceTransformer):
            break
        if isinstance(each, DistributedDataParallel):
            return each
    return None


def may_route(model: nn.Module) -> bool:
    """Return whether different texts may go through different weights."""
    return any(hasattr(each, "sub_modules") for each in model.modules())


@contextmanager
def found_behind(wrapped: DistributedDataParallel, others: list[Tensor]) -> Iterator[None]:
    """Let a call of the wrapped model also return other embeddings.

    DistributedDataParallel treats weights as unused if the result of its call does not need them.
    """

    def beside(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
        return {**output, "others": others}

    hook = wrapped.module.register_forward_hook(beside)
    try:
        yield
    finally:
        hook.remove()


def refuse_shards(model: nn.Module) -> None:
    """Raise OptionError if each call of the model waits for other processes' calls.

    DistributedDataParallel is called once a step, whatever is drawn.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        bases = {base.__name__ for part in model.modules() for base in type(part).__mro__}
        wrapped = parallel(model) is None and model is not bare(model)
        if wrapped or "FSDPModule" in bases:
            raise OptionError(
                "features='index' in several processes needs a model in "
                "DistributedDataParallel, or an unwrapped one: others, such as FSDP and "
                "DeepSpeed, need the same number of model calls in each process, but that "
                "number depends on what is drawn."
            )


def refuse_wrappers(model: nn.Module) -> None:
    """Raise OptionError if a wrapping loss has replaced how the model, or a part, is called."""
    inner = bare(model)
    for module in (model, inner, *inner.children()):
        forward = vars(module).get("forward")
        if isinstance(forward, _LAYERS):
            raise OptionError(
                "AdaptiveLayerLoss or Matryoshka2dLoss wraps NegativeCacheLoss: they take "
                "embeddings from earlier layers, which the cache does not hold. Use "
                "NegativeCacheLoss alone; for embeddings that can be shortened, "
                "NegativeCacheLoss(matryoshka_dims=…)."
            )
        if isinstance(forward, _CUTS):
            raise OptionError(
                "MatryoshkaLoss wraps NegativeCacheLoss: it cuts the embeddings that the cache "
                "holds whole. Use NegativeCacheLoss(matryoshka_dims=…) instead of wrapping it."
            )

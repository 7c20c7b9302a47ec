"""What may be around a model: the trainer's wrappers, and those of losses, which are refused."""

from negcache_torch import OptionError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_CUTS = (matryoshka.ForwardDecorator,)
_LAYERS = (adaptive_layer.ForwardDecorator, adaptive_layer.TransformerDecorator)


def bare(model: nn.Module) -> SentenceTransformer:
    """Return the model without what the trainer has put around it."""
    return next(each for each in model.modules() if isinstance(each, SentenceTransformer))


def local(model: nn.Module) -> nn.Module:
    """Return what DistributedDataParallel is around, if it is; that asks no other process."""
    parallel = (each for each in model.modules() if isinstance(each, DistributedDataParallel))
    found = next(parallel, None)
    return model if found is None else found.module


def refuse_wrappers(model: nn.Module) -> None:
    """Raise OptionError where a wrapping loss has replaced how the model, or a part, is called."""
    inner = bare(model)
    for module in (model, inner, *inner.children()):
        forward = vars(module).get("forward")
        if isinstance(forward, _LAYERS):
            raise OptionError(
                "AdaptiveLayerLoss or Matryoshka2dLoss is around NegativeCacheLoss: they take "
                "embeddings from earlier layers, which the cache does not hold. Use "
                "NegativeCacheLoss alone; for embeddings that may be cut, "
                "NegativeCacheLoss(matryoshka_dims=…)."
            )
        if isinstance(forward, _CUTS):
            raise OptionError(
                "MatryoshkaLoss is around NegativeCacheLoss: it cuts the embeddings that the cache "
                "holds whole. Use NegativeCacheLoss(matryoshka_dims=…) instead of wrapping it."
            )

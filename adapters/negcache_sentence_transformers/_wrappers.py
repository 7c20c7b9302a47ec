"""Losses that wrap another one and change what its model returns: refused, with the way out."""

from negcache_torch import OptionError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import adaptive_layer, matryoshka
from torch import nn

_CUTS = (matryoshka.ForwardDecorator,)
_LAYERS = (adaptive_layer.ForwardDecorator, adaptive_layer.TransformerDecorator)


def bare(model: nn.Module) -> SentenceTransformer:
    """Return the model without what the trainer has put around it."""
    return next(each for each in model.modules() if isinstance(each, SentenceTransformer))


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

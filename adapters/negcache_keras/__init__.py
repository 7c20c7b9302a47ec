"""negcache for Keras 3 on TensorFlow, JAX or PyTorch: a cache that `fit` trains against and saves.

>>> from negcache_keras import CacheLayer, NegativeCacheLoss
"""

from negcache_core import FieldSpec

from ._chosen import NegativeCacheLoss
from .layer import CacheLayer

__all__ = ["CacheLayer", "FieldSpec", "NegativeCacheLoss"]

"""negcache for Keras 3 on TensorFlow: a cache that `fit` trains against and saves with the model.

>>> from negcache_keras import CacheLayer
"""

from .layer import CacheLayer

__all__ = ["CacheLayer"]

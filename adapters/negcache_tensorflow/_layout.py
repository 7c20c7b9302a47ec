"""What a checkpoint and the handler that it is restored into must agree on."""

import json
from collections.abc import Mapping

import tensorflow as tf

from negcache_core import CheckpointError, FieldSpec, NegativeCache
from negcache_core.arrays.validation import check_keys
from negcache_core.cache.restoring import check_layout


class Layout(tf.train.experimental.PythonState):
    """Fields, shapes and dtypes, as text in the checkpoint.

    TensorFlow restores Python state first, so a checkpoint that does not fit is refused here,
    before any variable is assigned. TensorFlow itself assigns what fits, and skips unknown names.
    """

    def __init__(self, caches: Mapping[str, NegativeCache]) -> None:
        super().__init__()
        self._caches = {
            name: NegativeCache({key: _spec(rows) for key, rows in data.items()}, _spec(age))
            for name, (data, age) in caches.items()
        }
        self.restored = False  # whether a checkpoint was restored and not yet checked

    def serialize(self) -> str:
        """Return what goes into a checkpoint."""
        return json.dumps(self._caches)

    def deserialize(self, value: str) -> None:
        """Raise KeysError, CapacityError, ShapeError or DTypeError unless a checkpoint fits."""
        try:
            given = {
                name: NegativeCache(
                    {key: FieldSpec(*spec) for key, spec in data.items()}, FieldSpec(*age)
                )
                for name, (data, age) in json.loads(value).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"a checkpoint describes its caches as {value!r}: expected what a handler wrote."
            ) from error
        check_keys(given, self._caches, "the checkpoint", exact=True)
        for name, own in self._caches.items():
            check_layout(given[name], own, f"cache {name!r}")
        self.restored = True


def _spec(table: tf.Variable) -> FieldSpec:
    return FieldSpec(tuple(table.shape), table.dtype.name)

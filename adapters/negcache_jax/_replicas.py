"""Exchange between the devices along an axis of a mesh, inside `jax.shard_map`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from negcache_core import KindError, OptionError, ShapeError
from negcache_core.adapter import Replicas, Route


class MeshAxis(Replicas[Array]):
    """The devices along one axis of a mesh, or along several, given as a tuple.

    One program runs on all of them, so their sizes are equal and known, and only the rank is
    traced. No shape may depend on a draw: each device makes every draw, as if all were its own, and
    then selects by owner. It does this in as many turns as there are devices, which takes no more
    memory than its own draws.
    """

    lasting = False  # the rank is a part of one trace

    def __init__(self, name: str | tuple[str, ...]) -> None:
        names = name if isinstance(name, tuple) else (name,)
        if not names or not all(isinstance(each, str) for each in names):
            raise KindError(
                f"group is {name!r}: expected the name of a mesh axis, or a tuple of several."
            )
        try:
            self.count = jax.lax.axis_size(name)
        except NameError as error:
            raise OptionError(
                f"no mesh axis {name!r} is in scope: call this inside jax.shard_map over a mesh "
                "with that axis, or make the loss with your mesh's axis as its group."
            ) from error
        self.name, self.rank, self.turns = name, jax.lax.axis_index(name), self.count

    def first(self, sizes: Sequence[int]) -> Array:
        return self.rank * sizes[0]

    def own(self, array: Array, sizes: Sequence[int]) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, self.first(sizes), sizes[0])

    def numbers(self, own: Sequence[int], like: Array) -> list[tuple[int, ...]]:
        return [tuple(own)] * self.count

    def texts(self, own: str, like: Array) -> list[str]:
        return [own] * self.count

    def agree(self, own: Mapping[str, Any], like: Array) -> None:
        """Do nothing: one program runs on all devices."""

    def check_slots(self, slots: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        for name, here in slots.items():
            size = facts.get(f"{name}.cache_size")
            if size is not None and here * self.count != size:
                raise ShapeError(
                    f"cache {name!r} has {here} slots on each of {self.count} devices along "
                    f"{self.name!r}: expected {size} in total. Pass the state through shard_map "
                    "with handler.specs() in in_specs and out_specs."
                )

    def gather(self, arrays: Sequence[Array], sizes: Sequence[int]) -> list[Array]:
        return [jax.lax.all_gather(array, self.name, tiled=True) for array in arrays]

    def total(self, sums: Array, xp: Any) -> Array:
        return jax.lax.psum(sums, self.name)  # shard_map knows that this is the same everywhere

    def gather_fresh(self, array: Array, sizes: Sequence[int]) -> Array:
        return jax.lax.all_gather(array, self.name, tiled=True)  # JAX transposes it to a sum

    def parts(self, array: Array, sizes: Sequence[int]) -> Array:
        received = jax.lax.all_to_all(array, self.name, 0, 0, tiled=True)
        return received.reshape(self.count, sizes[0], *array.shape[1:])

    def sum_of_parts(self, array: Array, sizes: Sequence[int]) -> Array:
        return self.parts(array, sizes).sum(0)  # one operation for any number of devices

    def serve(self, arrays: Sequence[Array], route: Route) -> list[Array]:
        # Every device sends a row for each draw; the receiver takes the owner's. This sends as much
        # as a sum of masked rows, but works for any dtype and any value.
        owner, place = self.own(route.owner, route.sizes), jnp.arange(route.sizes[0])
        return [self.parts(array, route.sizes)[owner, place] for array in arrays]

    def give_back(self, arrays: Sequence[Array], route: Route) -> list[Array]:
        return self.gather(arrays, route.sizes)

    def entries(self, owner: Array) -> Array:
        return jnp.arange(owner.shape[0])

"""Where a cache's state lives in PyTorch: in buffers."""

from torch import Tensor, nn

from negcache_core import NegativeCache


class CacheTable(nn.Module):
    """One cache's rows and ages as buffers: they are saved, moved and copied with the module."""

    age: Tensor

    def __init__(self, cache: NegativeCache) -> None:
        super().__init__()
        self._names = {key: "field_" + module_name(key) for key in cache.data}
        for key, table in cache.data.items():
            self.register_buffer(self._names[key], table)
        self.register_buffer("age", cache.age)

    @property
    def cache(self) -> NegativeCache:
        """The live rows and ages: writing to these tensors writes to the buffers."""
        data = {key: self.get_buffer(name) for key, name in self._names.items()}
        return NegativeCache(data, self.age)


def module_name(key: str) -> str:
    """Return `key` without the dots that PyTorch allows in no name; distinct for distinct keys."""
    return key.replace("%", "%25").replace(".", "%2E")

"""What is known of a public name: its kind, signature, types and description, in a package's terms.

An adapter's methods often take what the core's take, and something more: `(state, *arguments,
**options)`. Here such a signature is written out, and a description that leaves arguments to
another name is completed from there.
"""

import collections.abc
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from api_layout import ELSEWHERE

import negcache_core
from negcache_core.arrays._array import Array
from negcache_core.docstrings import Paragraph, entries_of, merged, paragraphs

TENSORS = {
    "negcache_core": "array",
    "negcache_torch": "Tensor",
    "negcache_tensorflow": "tf.Tensor",
    "negcache_jax": "jax.Array",
    "negcache_sentence_transformers": "Tensor",
}
_FRAMEWORKS = {
    "negcache_torch": "PyTorch",
    "negcache_tensorflow": "TensorFlow",
    "negcache_core": "JAX:",  # how to write there what the paragraphs before say
}
_PARAMETERS = {
    "negcache_torch": "Parameter",
    "negcache_tensorflow": "tf.Variable",
    "negcache_jax": "jax.Array",
}
_GROUPS = {
    "negcache_torch": "ProcessGroup or DeviceMesh",
    "negcache_tensorflow": "tf.distribute.Strategy",
    "negcache_jax": "str, tuple[str, ...] or Mesh",
}
_GENERATORS = {
    "negcache_core": "int or numpy.random.Generator",
    "negcache_torch": "int or torch.Generator",
    "negcache_sentence_transformers": "int or torch.Generator",
    "negcache_tensorflow": "int or tf.random.Generator",
    "negcache_jax": "None",
}
# Names whose annotation says less than a reader wants; {tensor} and others are the package's words.
_TYPES = {
    "scale": "float, {parameter} or function",
    "embedding": "{tensor} (B, D) or int",
    "generator": "{generator}",
    "group": "{group}",
    "dtype": "dtype",
    "key": "{tensor}",
    "state": "HandlerState",
    "item_network": "function",
    "doc_network": "function",
    "positive_ids": "{tensor} or Mapping[str, {tensor}]",
    "cache_loss": "CacheClassificationLoss or function",
    "new_items_filter": "function",
    "NegativeCacheLoss.features": "Mapping[str, {tensor} or FieldSpec]",
    "NegativeCacheLoss.labels": "Mapping[str, {tensor} or FieldSpec]",
    "NegativeCacheLoss.items": "Sequence",
    "CacheManager.specs": "Mapping[str, FieldSpec]",
    "DistributedCacheClassificationLoss.group": "{group}",
    "CacheLossReturn.updated_item_data": "dict[str, {tensor}]",
    "CacheLossReturn.metrics": "dict[str, {tensor}]",
    "Retrieval.features": "dict[str, {tensor}]",
    "Retrieval.route": "",
    "Retrieval.pool": "",
    "Retrieval.others": "",
    "Retrieval.own": "",
    "plot_cache.handler": "CacheLossHandler or MultiCacheLossHandler",
    "NegativeCacheLoss.forward.sentence_features": "Iterable[Mapping[str, {tensor}]]",
    "prompt": "str or Mapping[str, str]",
    "max_length": "int or Mapping[str, int]",
}
_SHAPE = re.compile(r"(?:(?:bool|int32|float32) )?\((?:[^()]*,[^()]*)\)(?=[,;: ]|$)")


class Argument(NamedTuple):
    """An argument of a function, or a field of a record."""

    name: str
    type: str
    default: str | None
    text: str


def resolve(package: str, name: str) -> Any:
    """Return what a dotted public name is, properties as such; AttributeError if it is not."""
    value: Any = importlib.import_module(package)
    if name == "CacheLossHandler.metrics":  # set in the constructor
        return property(
            doc="The last step's scalars by name: {name: scalar}. See `docs/metrics.md`."
        )
    for part in name.split("."):
        value = inspect.getattr_static(value, part)
    return value


def has(package: str, name: str) -> bool:
    """Return whether a package has a public name."""
    if package == "negcache_jax" and name in _HELD:
        return False
    try:
        resolve(package, name)
    except AttributeError:
        return False
    return True


_HELD = ("CacheLossHandler.metrics", "CacheLossHandler.cache", "MultiCacheLossHandler.cache")


def kind_of(name: str, value: Any) -> str:
    """Return the directive of Sphinx's Python domain that describes a value."""
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    if isinstance(value, property):
        return "property"
    if not callable(value):
        return "data"
    return "method" if "." in name else "function"


def is_record(value: Any) -> bool:
    """Return whether a value is a class of named tuples."""
    return inspect.isclass(value) and hasattr(value, "_fields")


def parameters_of(package: str, name: str) -> list[inspect.Parameter]:
    """Return the parameters of a class or function, with those that it hands on written out."""
    bound = "." in name or inspect.isclass(resolve(package, name))
    outer: list[inspect.Parameter] = []
    inner: list[inspect.Parameter] = []
    for function in _functions(package, name):
        inner = list(inspect.signature(function).parameters.values())[bound:]
        starred = [each.kind for each in inner if each.kind in _STARRED]
        if not starred or (
            len(starred) == 1 and function.__module__.startswith("negcache_core")
        ):  # its **options are options of the loss
            break
        outer += [each for each in inner if each.kind not in _STARRED]
    own = {each.name: each for each in reversed(outer)}  # the first class's defaults count
    known = [each.replace(default=own.pop(each.name, each).default) for each in inner]
    shown = [each for each in known if each.name not in _FOR_ADAPTERS]
    return sorted([*reversed(own.values()), *shown], key=lambda each: each.kind)


_FOR_ADAPTERS = ("backend", "xp")  # arguments that are no concern of users
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _functions(package: str, name: str) -> Iterator[Any]:
    """Return a function and those that it hands its arguments on to, by the order of classes."""
    value = resolve(package, name)
    owner, _, method = name.rpartition(".")
    if inspect.isclass(value):
        owner, method = name, "__init__"
    if not owner:
        yield value
        return
    for cls in resolve(package, owner).__mro__:
        if method in vars(cls) and cls is not object:
            yield vars(cls)[method]


def arguments_of(package: str, name: str) -> list[Argument]:
    """Return the arguments of a name, or the fields of a record, each with its description."""
    value = resolve(package, name)
    texts = _texts(package, name)
    if is_record(value):
        hints = typing.get_type_hints(value)
        return [
            _argument(package, name, field, hints[field], None, texts.get(field, ""))
            for field in value._fields
        ]
    if not callable(value) or (inspect.isclass(value) and inspect.isabstract(value)):
        return []
    found = []
    for parameter in parameters_of(package, name):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found += _options(package, texts)
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            default = parameter.default
            shown = None if default is inspect.Parameter.empty else _default(default)
            text = texts.get(parameter.name, "")
            found.append(
                _argument(package, name, parameter.name, parameter.annotation, shown, text)
            )
    return found


def _options(package: str, texts: dict[str, str]) -> Iterator[Argument]:
    """Describe what `**options` stands for: the names that its entry begins with."""
    loss = "CacheClassificationLoss"
    known = {
        each.name: each
        for method in ("retrieve", "loss_from_negatives")
        for each in arguments_of(package, f"{loss}.{method}")
    }
    for option in texts.get("options", "").partition(":")[0].split(", "):
        if option in known:
            yield known[option]


def _texts(package: str, name: str) -> dict[str, str]:
    """Return argument -> description, its own or that of the name that it is left to."""
    found: dict[str, str] = {}
    for each in (*reversed(ELSEWHERE.get(name, ())), name):
        where = package if has(package, each) else "negcache_core"
        told = entries_of(paragraphs(docstring_of(where, each)))
        found |= {name: text for name, text in told.items() if not text.startswith("see ")}
    if package == "negcache_jax":
        found.setdefault("state", "a state of this handler, as `init` makes and each call returns")
    return found


def docstring_of(package: str, name: str) -> str:
    """Return the docstring of a name, an adapter's joined with the core's."""
    value = resolve(package, name)
    own = inspect.getdoc(value.fget if isinstance(value, property) and value.fget else value)
    if "." not in name or package == "negcache_core":
        return own or ""
    try:
        core = inspect.getdoc(resolve("negcache_core", name))
    except AttributeError:
        return own or ""
    return merged(core, None if own == core else own)


def prose_of(package: str, name: str) -> list[Paragraph]:
    """Return what a docstring says besides its arguments.

    Paragraphs that begin with another framework's name are left out, and so are examples in NumPy.
    """
    told = [each for each in paragraphs(docstring_of(package, name)) if each.kind != "table"]
    core = resolve(package, name) is getattr(negcache_core, name, None)
    others = tuple(word for where, word in _FRAMEWORKS.items() if where != package)
    return [
        each
        for each in told
        if not each.lines[0].startswith(others) and not (core and each.kind == "example")
    ]


def _argument(
    package: str, name: str, argument: str, annotation: Any, default: str | None, text: str
) -> Argument:
    words = {
        "tensor": TENSORS[package],
        "parameter": _PARAMETERS.get(package, "array"),
        "group": _GROUPS.get(package, ""),
        "generator": _GENERATORS[package],
    }
    told = _TYPES.get(f"{name}.{argument}", _TYPES.get(argument))
    told = None if annotation in (bool, int, float, str) else told
    kind = readable(annotation, TENSORS[package]) if told is None else told.format(**words)
    shape = _SHAPE.match(text)
    if shape and kind == TENSORS[package]:
        kind = f"{kind} {shape[0]}"
        text = text[shape.end() :].lstrip(",;: ")
    return Argument(argument, kind, default, text)


def _default(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def readable(annotation: Any, tensor: str) -> str:
    """Return a type in few words: arrays are the framework's, every callable is a function."""
    origin = typing.get_origin(annotation)
    given = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(readable(each, tensor) for each in given if each is not types.NoneType)
        )
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return "function"
    if origin is not None:
        inner = ", ".join("…" if each is ... else readable(each, tensor) for each in given)
        name = getattr(origin, "__name__", str(origin))
        return "path" if name == "PathLike" else f"{name}[{inner}]"
    if annotation in (Any, Array, inspect.Parameter.empty):
        return tensor
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__name__", str(annotation))

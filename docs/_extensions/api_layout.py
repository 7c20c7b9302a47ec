"""What stands where on a reference page: sections by task, and the names of each.

A name that a package lacks is left out on its page, so one layout serves them all.
"""

from typing import NamedTuple


class Section(NamedTuple):
    """A section of a page: its anchor, title, a line about it, and the public names in order."""

    anchor: str
    title: str
    about: str
    names: tuple[str, ...]


HANDLER = "CacheLossHandler"
ADAPTER = (
    Section(
        "make",
        "Make a loss",
        "One line makes a cache, its loss and the handler of both.",
        ("NegativeCacheLoss", "CacheLossHandler.init", "HandlerState", "FieldSpec", "in_chunks"),
    ),
    Section(
        "train",
        "Train and evaluate",
        "A step, and the loss of held-out data. These are methods of every handler, and so of a "
        "NegativeCacheLoss.",
        (
            "CacheLossHandler.update_cache_and_compute_loss",
            "CacheLossHandler.evaluate",
            "CacheLossReturn",
        ),
    ),
    Section(
        "phases",
        "A step in three phases",
        "One call of the encoder can then embed positives and negatives together: draw, embed, "
        "compute the loss, commit.",
        (
            "CacheLossHandler.bind",
            "CacheLossHandler.retrieve",
            "CacheLossHandler.compute_loss",
            "CacheLossHandler.commit",
            "Retrieval",
        ),
    ),
    Section(
        "fill",
        "Fill and refresh",
        "What changes the rows of a cache between steps.",
        (
            "CacheLossHandler.prefill",
            "CacheLossHandler.refresh",
            "CacheLossHandler.reset",
            "CacheLossHandler.resize",
            "CacheLossHandler.evict_nonfinite",
        ),
    ),
    Section(
        "save",
        "Save and resume",
        "The guide: :doc:`/resume`.",
        ("CacheLossHandler.save", "CacheLossHandler.load", "CacheLossHandler.restore"),
    ),
    Section(
        "shards",
        "Shards on several devices",
        "One cache, cut into parts that several devices hold. The guide: :doc:`/scaling`.",
        (
            "DistributedCacheClassificationLoss",
            "CacheLossHandler.distributed_state_dict",
            "CacheLossHandler.specs",
            "CacheLossHandler.shardings",
            "scaling",
            "Scaling",
            "Scaling.table",
            "Scaling.table_bytes",
            "Scaling.work_bytes",
            "Scaling.sent_bytes",
            "Scaling.sent_by_all",
        ),
    ),
    Section(
        "look",
        "Look inside",
        "What a cache holds, and what the numbers say about the training.",
        (
            "CacheLossHandler.cache",
            "CacheLossHandler.metrics",
            "CacheLossHandler.diagnose",
            "plot_cache",
            "NegativeCache",
            "EMPTY",
            "__version__",
        ),
    ),
    Section(
        "parts",
        "Put a loss together from its parts",
        "The classes of the published code. Use them for several caches, a score function of your "
        "own, or code that follows the paper. Migrating: :doc:`/migrating`.",
        (
            "CacheManager",
            "CacheManager.init_cache",
            "CacheManager.update_cache",
            "CacheClassificationLoss",
            "CacheClassificationLoss.__call__",
            "CacheClassificationLoss.evaluate",
            "CacheClassificationLoss.retrieve",
            "CacheClassificationLoss.loss_from_negatives",
            "CacheClassificationLoss.item_keys",
            "CacheLossHandler",
            "CacheLossHandler.cache_manager",
            "CacheLoss",
        ),
    ),
    Section(
        "caches",
        "Several caches",
        "",
        (
            "MultiCacheLossHandler",
            "MultiCacheLossHandler.update_cache_and_compute_loss",
            "MultiCacheLossHandler.evaluate",
            "MultiCacheLossHandler.retrieve",
            "MultiCacheLossHandler.commit",
            "MultiCacheLossHandler.prefill",
            "MultiCacheLossHandler.refresh",
            "MultiCacheLossHandler.cache",
        ),
    ),
    Section(
        "choose",
        "Choose negatives, filter items",
        "Which rows become negatives, and which items enter the cache.",
        (
            "GumbelMaxRetrievalFn",
            "MaxScoreRetrievalFn",
            "AbstractRetrievalFn",
            "approximate_top_k_with_indices",
            "IsInCacheFilterFn",
            "CacheFilterFn",
        ),
    ),
    Section(
        "errors",
        "Errors and warnings",
        "Each error is also a ``ValueError`` or a ``TypeError``. Its message says what was given, "
        "what was expected and what to do; nothing was changed.",
        (
            "NegcacheError",
            "CapacityError",
            "CheckpointError",
            "DTypeError",
            "DeviceError",
            "KeysError",
            "KindError",
            "OptionError",
            "ShapeError",
            "NonFiniteWarning",
            "TrainingWarning",
        ),
    ),
)
SENTENCE_TRANSFORMERS = (
    Section("make", "Make a loss", "", ("NegativeCacheLoss",)),
    Section(
        "train",
        "Train",
        "A trainer calls the loss. In a training loop of your own you do.",
        ("NegativeCacheLoss.forward",),
    ),
    Section("save", "Save and resume", "", ("keep_cache",)),
    Section(
        "look",
        "Look inside",
        "",
        (
            "NegativeCacheLoss.metrics",
            "NegativeCacheLoss.temperature",
            "NegativeCacheLoss.get_config_dict",
            "NegativeCacheLoss.citation",
        ),
    ),
)
LAYOUTS = {
    "negcache_core": ADAPTER,
    "negcache_torch": ADAPTER,
    "negcache_tensorflow": ADAPTER,
    "negcache_jax": ADAPTER,
    "negcache_sentence_transformers": SENTENCE_TRANSFORMERS,
}
# What is to be said of a section in one package.
NOTES = {
    ("negcache_jax", "make"): "The state of a loss is explicit: it goes into each call and comes "
    "out of it.",
    ("negcache_jax", "phases"): "In JAX these are methods of what "
    ":py:obj:`bind(state) <negcache_jax.CacheLossHandler.bind>` returns.",
    ("negcache_jax", "look"): "The rows are in the state: ``state.caches``.",
    ("negcache_torch", "save"): "Rows, ages and the generator are also part of the "
    "``state_dict()`` of every model that holds the loss.",
    ("negcache_tensorflow", "save"): "Rows, ages and the generator are also variables of a "
    "``tf.Module``, which ``tf.train.Checkpoint`` saves.",
}
# Where an argument is described that its own docstring leaves to others.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "NegativeCacheLoss": ("CacheClassificationLoss", "CacheManager", HANDLER),
    "DistributedCacheClassificationLoss": ("CacheClassificationLoss",),
    "MultiCacheLossHandler": (HANDLER,),
    "CacheLossHandler.update_cache_and_compute_loss": (
        "CacheClassificationLoss.retrieve",
        "CacheClassificationLoss.loss_from_negatives",
    ),
    "CacheLossHandler.evaluate": (
        "CacheLossHandler.update_cache_and_compute_loss",
        "CacheClassificationLoss.retrieve",
        "CacheClassificationLoss.loss_from_negatives",
    ),
    "CacheLossHandler.retrieve": (
        "CacheLossHandler.update_cache_and_compute_loss",
        "CacheClassificationLoss.retrieve",
    ),
    "CacheLossHandler.compute_loss": (
        "CacheClassificationLoss.loss_from_negatives",
        "CacheLossHandler.update_cache_and_compute_loss",
    ),
    "CacheLossHandler.commit": ("CacheLossHandler.update_cache_and_compute_loss",),
    "CacheLossHandler.load": ("CacheLossHandler.restore",),
    "CacheLossHandler.prefill": ("CacheLossHandler.update_cache_and_compute_loss",),
    "CacheClassificationLoss.__call__": (
        "CacheClassificationLoss.retrieve",
        "CacheClassificationLoss.loss_from_negatives",
    ),
    "CacheClassificationLoss.evaluate": (
        "CacheClassificationLoss.__call__",
        "CacheClassificationLoss.retrieve",
        "CacheClassificationLoss.loss_from_negatives",
    ),
} | {
    f"MultiCacheLossHandler.{name}": (
        "MultiCacheLossHandler.update_cache_and_compute_loss",
        f"{HANDLER}.{name}",
        f"{HANDLER}.update_cache_and_compute_loss",
        "CacheClassificationLoss.retrieve",
        "CacheClassificationLoss.loss_from_negatives",
    )
    for name in (
        "update_cache_and_compute_loss",
        "evaluate",
        "retrieve",
        "commit",
        "prefill",
        "refresh",
    )
}

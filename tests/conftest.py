import json
import os
import re

# Before any library is imported. Each worker has one core, and threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Most of the time goes into compiling programs that run once. TensorFlow 2.19 knows not all of
# these flags: `make test-lowest` sets none.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)  # the properties are checked in float64  # noqa: FBT003

OF_TENSORFLOW = re.compile(r"tensorflow|keras|tf\.function")
LONG = re.compile(r"(_shards|_pages|_demo|_types|_example)\.py")  # most of them are processes

# Timings say nothing here: the first example of a backend pays for its tracing.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, max_examples=40, **COMMON)
settings.register_profile("deep", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """Put tests of a framework side by side: what it has compiled or converted serves them all.

    `--dist worksteal` gives each process a stretch of this order, and the rest to who is idle.
    The longest go first: the last one would keep all but one of them waiting.
    """

    def place(name):
        return not LONG.search(name), ("jax" not in name) + bool(OF_TENSORFLOW.search(name))

    items.sort(key=lambda item: place(item.nodeid))


def pytest_terminal_summary(terminalreporter):
    """Say how many cases the fuzz test tried on each backend, and how they came out."""
    reports = [report for part in terminalreporter.stats.values() for report in part]
    found = {}  # also of xdist's workers: what a test records travels with its report
    for report in reports:
        for key, value in getattr(report, "user_properties", ()):
            if key == "fuzzed":
                name, outcomes = json.loads(value)
                found[name] = outcomes
    for name, outcomes in found.items():
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        terminalreporter.write_line(f"fuzzed {name}: {sum(outcomes.values())} cases ({told})")

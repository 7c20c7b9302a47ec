"""Sum up what `make gpu` found: the steps beside the bare product, and what waits for the device.

    python benchmarks/gpu_summary.py

Times are milliseconds of a step with the front door's defaults: "float32 graph" is one of float32
rows in a CUDA graph. MB are those beyond the tables.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from _device_jobs import KEPT, read
from _harness import RESULTS, table

Record = dict[str, Any]
COLUMNS = {
    "torch": [
        *(("float32", "eager", False), ("float32", "graph", False), ("bfloat16", "graph", False)),
        *(("int8", "graph", False), ("bfloat16", "graph", True), ("int8", "graph", True)),
        ("bfloat16", "compiled", False),
    ],
    "jax": [(kind, "jit", fused) for fused in (False, True) for kind in ("float32", "bfloat16")],
}


def lines_of(records: list[Record], framework: str) -> list[Record]:
    """Return a line for each size: the bare products, and the steps."""
    sizes = sorted({_size(each) for each in records})
    found = []
    for size in sizes:
        here = [each for each in records if _size(each) == size]
        line: Record = dict(zip(("C", "D", "B"), size, strict=True))
        for storage in ("float32", "bfloat16"):
            line[f"product {storage}"] = _figure(here, "ms", what="product", storage=storage)
        for storage, mode, fused in COLUMNS[framework]:
            facts = {"what": "step", "loss": "exact_query", "storage": storage, "mode": mode}
            title = f"{storage} {mode}{' fused' if fused else ''}"
            line[title] = _figure(here, "ms", **facts, fused=fused)
        mode = "eager" if framework == "torch" else "jit"
        facts = {"what": "step", "loss": "exact_query", "storage": "float32", "mode": mode}
        line["MB, float32"] = _figure(here, "MB", **facts, fused=False)
        found.append(line)
    return found


def _size(record: Record) -> tuple[int, ...]:
    return record["slots"], record["width"], record["rows"]


def _figure(records: list[Record], figure: str, **facts: Any) -> float | None:
    for record in records:
        if all(record[key] == value for key, value in facts.items()):
            return record.get(figure)
    return None


def of_steps(path: Path) -> list[str]:
    """Return paragraphs about the times of steps, for each device and framework."""
    records, said = read(path), []
    for device, framework in sorted({(each["device"], each["framework"]) for each in records}):
        own = [
            each for each in records if (each["device"], each["framework"]) == (device, framework)
        ]
        failed = Counter(each["error"] for each in own if "error" in each)
        words = [f"{count} times {error}" for error, count in failed.most_common()]
        title = f"{device}, {own[-1]['version']}: milliseconds"
        said.append("\n".join([title, table(lines_of(own, framework)), *words]))
    return said or ["No step was timed."]


def of_reads() -> str:
    """Return a paragraph about what waits for the device."""
    path = RESULTS / "host_reads_cuda.json"
    if not path.exists():
        return "What waits for the device was not looked at."
    rows = json.loads(path.read_text())["rows"]
    waiting = Counter(row["what"] for row in rows if row["operation"])
    silent = sum(row["waits in"] is None for row in rows)
    listed = ", ".join(f"{name} ({count} places)" for name, count in waiting.items()) or "nothing"
    skipped = [f"{row['what']} {row['waits in']}" for row in rows if not row["operation"]]
    skipped = [words for words in skipped if "not run" in words]
    return "\n".join(
        [
            f"{rows[0]['device']}: {silent} operations wait for nothing; these wait: {listed}.",
            *skipped,
        ]
    )


def main() -> None:
    """Print everything."""
    print(*of_steps(KEPT), of_reads(), f"All results: {RESULTS}", sep="\n\n")


if __name__ == "__main__":
    main()

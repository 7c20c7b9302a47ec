"""The programs of two pages of the documentation run as printed, and print what they should."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
EXPECTED = {
    "mixed-precision.md": {
        "torch": "torch.float32 torch.float16",
        "tensorflow": "float32 float16",
        "jax": "float32 float32 bfloat16",
    },
    "compilers.md": {"torch": "1", "tensorflow": "1", "jax": "1"},
}


@pytest.mark.parametrize("framework", ["torch", "tensorflow", "jax"])
@pytest.mark.parametrize("page", EXPECTED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor imports deprecated names
def test_programs_run_as_printed(page, framework, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == 3
    (block,) = [each for each in blocks if f"import negcache_{framework}" in each]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    exec(compile(block, page, "exec"), {"__name__": page})  # noqa: S102 - it is our own
    assert capsys.readouterr().out.strip() == EXPECTED[page][framework]

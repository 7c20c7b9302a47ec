"""The examples of the reference: which name each is of, and the program that they all begin with.

`docs/reference/examples/` has a file for each package, and shared.txt for examples that read alike
everywhere. In a file a line at the margin names what the example below it is
of, several names apart by commas; `setup` is run before each.
"""

import doctest
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "reference" / "examples"
SETUP = "setup"
SHARING = ("negcache_core", "negcache_torch", "negcache_tensorflow", "negcache_jax")


def examples_of(package: str, folder: Path = FOLDER) -> dict[str, str]:
    """Return name -> example of a package, the setup among them."""
    shared = _read(folder / "shared.txt") if package in SHARING else {}
    return shared | _read(folder / f"{package}.txt")


def _read(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            names = re.split(r",\s*", line)
            found |= dict.fromkeys(names, "")
        elif not line.startswith("#"):
            for name in names:
                found[name] += line.removeprefix("    ") + "\n"
    return {name: text.strip("\n") for name, text in found.items()}


def run(package: str, examples: dict[str, str]) -> dict[str, str]:
    """Run examples, each on its own after the setup; return name -> what went wrong."""
    parser, failures = doctest.DocTestParser(), {}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for text, names in sharing(examples).items():
        program = text if names == [SETUP] else f"{examples[SETUP]}\n\n{text}"
        where = f"{package}.{names[0]}"
        test = parser.get_doctest(program, {"__name__": "__main__"}, where, None, 0)
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
        runner.run(test, out=said.append)
        if runner.failures:
            failures |= dict.fromkeys(names, "".join(said))
    return failures


def sharing(examples: dict[str, str]) -> dict[str, list[str]]:
    """Return example -> the names that it is of, in order."""
    found: dict[str, list[str]] = {}
    for name, text in examples.items():
        found.setdefault(text, []).append(name)
    return found

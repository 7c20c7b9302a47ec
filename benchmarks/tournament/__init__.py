"""The training tournament: towers trained in several ways, at equal numbers of encoder calls."""

import sys
from pathlib import Path

# The demo's pairs and their words are what is measured.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

"""The training tournament: towers trained in several ways, at equal numbers of encoder calls."""

import sys
from pathlib import Path

# It measures the demo's pairs and their words.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

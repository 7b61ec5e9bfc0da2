"""Makes the tests of the operations, whose cases are run here too, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

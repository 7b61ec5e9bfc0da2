"""Makes the helpers in this folder importable from every test, sub-folders included."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

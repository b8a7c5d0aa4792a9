"""What `fuzz.py` runs: one file for each surface that takes input from outside, and the harness that they share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests" / "helpers"))  # shapes.py

"""Makes the helpers of this folder, and the random layers shared with the kernel tests, importable here."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "kernels"):
    sys.path.insert(0, str(folder))

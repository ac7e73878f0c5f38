"""Every check of ``tests/runtime/service_stress.py`` for minutes, not seconds; prints a line of JSON for each.

python benchmarks/service_stress.py --minutes 5
python benchmarks/service_stress.py --minutes 5 --library build/libclaq.so --python other/bin/python
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "runtime"), str(ROOT / "tests" / "support")]


def main() -> int:
    from test_service import CHECKS, PROGRAM, write_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1, help="of each check that has no number of runs of its own")
    parser.add_argument("--runs", type=int, default=10_000, help="of the check of memory")
    parser.add_argument("--library", help="libclaq (default: that of the installed claq-runtime)")
    parser.add_argument("--python", default=sys.executable, help="interpreter with another ONNX Runtime")
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)} (default: all)")
    options = parser.parse_args()
    import claq_runtime

    library = options.library or claq_runtime.library_path()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for check in options.checks or CHECKS:
            limits = ["--seconds", str(60 * options.minutes), "--runs", str(options.runs)]
            failed += subprocess.run([options.python, PROGRAM, folder, library, check, *limits]).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

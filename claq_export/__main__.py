"""``python -m claq_export``: the command line."""

import sys


def main() -> int:
    """Entry point of ``claq-export``: Ctrl-C while the command line itself is imported is no traceback either."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("claq-export: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m raymerge`, also of a checkout that is not installed, and what the command `raymerge` runs."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`cli.main`, and 130 without a trace for Ctrl-C where that cannot see to it: while it is being imported, which
    takes a second, and a second time while the first is seen to."""
    try:
        from raymerge.cli import main as run

        return run(argv)
    except KeyboardInterrupt:
        print("raymerge: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""`python -m raymerge`, also of a checkout that is not installed, and what the command `raymerge` runs."""

import atexit
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """`cli.main`, and 130 without a trace for Ctrl-C where that cannot see to it: while it is being imported, which
    takes a second, and a second time while the first is seen to."""
    try:
        from raymerge.cli import main as run

        code = run(argv)
    except KeyboardInterrupt:
        print("raymerge: interrupted", file=sys.stderr)
        code = 130
    if code == 130:  # once more while Python ends would show a trace of what Ray does there
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())

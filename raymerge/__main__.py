"""`python -m raymerge`: the command line, also of a checkout that is not installed."""

import sys

from raymerge.cli import main

if __name__ == "__main__":
    sys.exit(main())

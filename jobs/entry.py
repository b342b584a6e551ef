"""What every entry point for `ray job submit` does: run one raymerge command with the job's own arguments.

The project is uploaded by `--working-dir .` and need not be installed on the cluster's machines; what pyproject.toml
asks for must be there, or be named in the job's runtime environment (see cluster.yaml). OUT must be an absolute path
that the machines share, or a URI such as s3://bucket/run. The exit code is the command's: 0 done, 1 a bug, 2 a wrong
input or no room, 129 its terminal closed, 130 interrupted, 141 nobody reads the output, 143 stopped. The same job again
goes on from what is stored.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raymerge.__main__ import main  # noqa: E402


def run(command: str) -> None:
    """Run `raymerge COMMAND` with this process's arguments, and exit with its code."""
    sys.exit(main([command, *sys.argv[1:]]))

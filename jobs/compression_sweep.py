"""The compression curve as a Ray job:

ray job submit --working-dir . -- python jobs/compression_sweep.py jobs/configs/sweep-demo.yaml [--set KEY=VALUE]
"""

import sys
from pathlib import Path

# A job's working directory is the project, which need not be installed on the cluster's machines.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raymerge.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))

"""Alpha search as a Ray job:

ray job submit --working-dir . -- python jobs/search_alphas.py jobs/configs/demo.yaml [--out RUN] [--set KEY=VALUE]
"""

import sys
from pathlib import Path

# A job's working directory is the project, which need not be installed on the cluster's machines.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raymerge.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))

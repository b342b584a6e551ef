"""Sensitivity of layer similarity as a Ray job:

ray job submit --working-dir . -- python jobs/similarity_sensitivity.py jobs/configs/similarity-mka-demo.yaml
"""

import sys
from pathlib import Path

# A job's working directory is the project, which need not be installed on the cluster's machines.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raymerge.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["sensitivity", *sys.argv[1:]]))

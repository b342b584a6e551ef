"""Layer similarity as a Ray job:

ray job submit --working-dir . -- python jobs/layer_similarity.py jobs/configs/similarity-tasks-demo.yaml [--out RUN]
"""

import sys
from pathlib import Path

# A job's working directory is the project, which need not be installed on the cluster's machines.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from raymerge.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["similarity", *sys.argv[1:]]))

"""Alpha search as a Ray job:

ray job submit --working-dir . -- python jobs/search_alphas.py jobs/configs/demo.yaml --out OUT [--set KEY=VALUE]
"""

from entry import run

if __name__ == "__main__":
    run("search")

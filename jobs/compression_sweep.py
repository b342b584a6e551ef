"""The compression curve as a Ray job:

ray job submit --working-dir . -- python jobs/compression_sweep.py jobs/configs/sweep-demo.yaml --out OUT
"""

from entry import run

if __name__ == "__main__":
    run("sweep")

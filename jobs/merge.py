"""A merge by an alpha file as a Ray job:

ray job submit --working-dir . -- python jobs/merge.py demo --alphas FILE --out OUT
"""

from entry import run

if __name__ == "__main__":
    run("merge")

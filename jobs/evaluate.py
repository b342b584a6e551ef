"""The evaluation of one model as a Ray job:

ray job submit --working-dir . -- python jobs/evaluate.py demo --out OUT
"""

from entry import run

if __name__ == "__main__":
    run("evaluate")

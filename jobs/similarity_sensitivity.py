"""Sensitivity of layer similarity as a Ray job:

ray job submit --working-dir . -- python jobs/similarity_sensitivity.py jobs/configs/similarity-mka-demo.yaml --out OUT
"""

from entry import run

if __name__ == "__main__":
    run("sensitivity")

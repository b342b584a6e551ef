"""Layer similarity as a Ray job:

ray job submit --working-dir . -- python jobs/layer_similarity.py jobs/configs/similarity-tasks-demo.yaml --out OUT
"""

from entry import run

if __name__ == "__main__":
    run("similarity")

"""heuristics.py: the published ratios in closed form, and which layers are chosen on planted similarities."""

import math
from functools import partial

import numpy as np
import pytest

from raymerge.heuristics import (
    best_block,
    block_scores,
    least_influence_plan,
    most_similar_pair,
    most_similar_pairs,
    pair_alphas,
    similar_block_scores,
    similarity_alpha,
    similarity_ratio,
)
from raymerge.plan import FIXED_RATIO, PlanError, tail_pairs

EPS = np.finfo(np.float64).eps


# -- base coefficients -----------------------------------------------------------------------------------------------


def test_the_fixed_ratio_is_sigmoid_of_one_half():
    assert math.isclose(FIXED_RATIO, math.exp(0.5) / (1 + math.exp(0.5)), rel_tol=4 * EPS)
    assert pair_alphas(tail_pairs(20, 13), "fixed") == [FIXED_RATIO] * 13
    assert pair_alphas(tail_pairs(20, 3), "fixed", ratio=0.7) == [0.7] * 3


def test_similarity_ratio_is_the_published_formula():
    similarity = np.random.default_rng(0).random((6, 6)) + 0.1
    found = pair_alphas(tail_pairs(6, 3), "similarity_ratio", similarity=similarity)
    for (into, remove), alpha in zip([(4, 5), (3, 4), (2, 3)], found, strict=True):
        s_i, s_j = np.mean(similarity[into]), np.mean(similarity[remove])
        r = s_i / (s_i + s_j)
        assert math.isclose(alpha, np.exp(r) / (1 + np.exp(r)), rel_tol=16 * EPS)
    assert math.isclose(similarity_ratio(np.ones((3, 3)), 0, 1), FIXED_RATIO, rel_tol=4 * EPS)
    r = 3 / 4
    rows = np.array([[3.0, 3.0], [1.0, 1.0]])
    assert math.isclose(similarity_ratio(rows, 0, 1, beta=2.0), 1 / (1 + math.exp(-2 * r)), rel_tol=16 * EPS)


def test_similarity_ratio_reaches_only_half_to_sigmoid_of_one():
    # r = 0 and r = 1 are the ends for similarities that are not negative.
    extreme = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert similarity_ratio(extreme, 0, 1) == 0.5
    assert math.isclose(similarity_ratio(extreme, 1, 0), math.e / (1 + math.e), rel_tol=4 * EPS)
    values = [similarity_ratio(np.random.default_rng(s).random((9, 9)) ** 4, 3, 7) for s in range(50)]
    assert min(values) >= 0.5 and max(values) <= 0.7311


def test_similarity_is_normalised_and_clipped():
    similarity = np.array([[4.0, 3.0, 9.0], [3.0, 9.0, -1.0], [9.0, -1.0, 1.0]])
    assert similarity_alpha(similarity, 0, 1) == 0.5  # 3 / sqrt(4 * 9)
    assert similarity_alpha(similarity, 1, 2) == 0.0  # negative
    assert similarity_alpha(similarity, 0, 2) == 1.0  # 9 / sqrt(4 * 1) = 4.5
    assert pair_alphas(tail_pairs(3, 2), "similarity", similarity=similarity) == [0.0, 0.5]


def test_similarities_without_values_are_refused():
    similarity = np.ones((4, 4))
    similarity[2, 0] = np.nan
    with pytest.raises(PlanError, match="similarity row 2 has no value at 1 of 4 layers, the first is 0"):
        pair_alphas(tail_pairs(4, 1), "similarity_ratio", similarity=similarity)
    with pytest.raises(PlanError, match="row 2"):
        similarity_ratio(similarity, 1, 2)
    similarity[2, 0], similarity[2, 3] = 1.0, np.nan
    with pytest.raises(
        PlanError, match="layers 2 and 3 have no similarity, or none with themselves; take another subset"
    ):
        pair_alphas(tail_pairs(4, 1), "similarity", similarity=similarity)
    for diagonal, told in ((0.0, "is 0, but must be"), (-1.0, "is -1, but must be"), (np.nan, "have no similarity")):
        broken = np.ones((2, 2))
        broken[0, 0] = diagonal
        with pytest.raises(PlanError, match=told):
            similarity_alpha(broken, 0, 1)
    with pytest.raises(PlanError, match="add up to 0"):
        similarity_ratio(np.array([[1.0, 1.0], [-1.0, -1.0]]), 0, 1)


def test_pair_alphas_refuse_what_they_cannot_do():
    with pytest.raises(PlanError, match="'best' is not one of fixed, similarity_ratio, similarity"):
        pair_alphas(tail_pairs(4, 1), "best")
    with pytest.raises(PlanError, match="needs a similarity matrix"):
        pair_alphas(tail_pairs(4, 1), "similarity")
    for shape in ((3, 3), (4, 5)):
        with pytest.raises(PlanError, match=rf"is \({shape[0]}, {shape[1]}\), but layer 3 is to be merged"):
            pair_alphas(tail_pairs(4, 1), "similarity", similarity=np.ones(shape))


# -- which layers to merge -------------------------------------------------------------------------------------------


def planted(n_layers, pairs):
    """A similarity of 0.1 everywhere, 1 on the diagonal, and the given values."""
    matrix = np.full((n_layers, n_layers), 0.1)
    np.fill_diagonal(matrix, 1.0)
    for (i, j), value in pairs.items():
        matrix[i, j] = matrix[j, i] = value
    return matrix


def test_the_most_similar_neighbours_are_merged_first():
    similarity = planted(6, {(1, 2): 0.7, (3, 4): 0.9, (0, 5): 0.99})
    assert most_similar_pairs(similarity, merges=2) == [(3, 4), (1, 2)]  # 0 and 5 are no neighbours
    # After 3 <- 4, layer 5 stands next to 3, which keeps its own row.
    similarity = planted(6, {(3, 4): 0.9, (3, 5): 0.8, (4, 5): 0.3, (1, 2): 0.5})
    assert most_similar_pairs(similarity, merges=3) == [(3, 4), (3, 5), (1, 2)]
    assert most_similar_pair(similarity, [0, 1, 2, 3, 5]) == (3, 5)


def test_a_threshold_stops_the_merging():
    similarity = planted(6, {(1, 2): 0.7, (3, 4): 0.9})
    assert most_similar_pairs(similarity, threshold=0.8) == [(3, 4)]
    assert most_similar_pairs(similarity, threshold=0.5) == [(3, 4), (1, 2)]
    assert most_similar_pairs(similarity, merges=1, threshold=0.5) == [(3, 4)]
    assert most_similar_pair(similarity, threshold=0.9) is None  # above, not at
    assert len(most_similar_pairs(similarity, threshold=-1.0)) == 5  # until one layer is left
    with pytest.raises(PlanError, match="no neighbouring layers are more similar than plan.threshold = 0.95"):
        most_similar_pairs(similarity, threshold=0.95)
    with pytest.raises(PlanError, match="needs plan.merges or plan.threshold"):
        most_similar_pairs(similarity)


def test_pairs_are_chosen_by_normalised_similarity():
    # Layer 1 is loud: its row is four times as large, which says nothing about likeness.
    similarity = planted(4, {(2, 3): 0.5}) * np.outer([1, 4, 1, 1], [1, 4, 1, 1])
    assert similarity[0, 1] == pytest.approx(0.4) and most_similar_pair(similarity) == (2, 3)


def test_equal_similarities_merge_the_deepest_pair_as_tail_merging_does():
    pairs = most_similar_pairs(planted(5, {}), merges=1)
    assert pairs == tail_pairs(5, 1)


def test_what_comes_before_a_first_layer_is_left_alone():
    similarity = planted(6, {(0, 1): 0.9, (1, 2): 0.8, (3, 4): 0.7})
    assert most_similar_pairs(similarity, merges=1, first=2) == [(3, 4)]
    influence = np.array([0.05, 0.5, 0.1, 0.3])
    plan = least_influence_plan(influence, 1, first=1)
    assert [kept.index for kept in plan.kept] == [0, 1, 3]
    for merges, choose in ((4, partial(most_similar_pairs, similarity)), (3, partial(least_influence_plan, influence))):
        with pytest.raises(PlanError, match=f"cannot merge {merges} layers"):
            choose(merges=merges, first=2 if merges == 4 else 1)


def test_pair_alphas_pass_beta_on():
    similarity = planted(4, {(2, 3): 0.5})
    (found,) = pair_alphas([(2, 3)], "similarity_ratio", similarity=similarity, beta=2.5)
    assert found == similarity_ratio(similarity, 2, 3, beta=2.5) != similarity_ratio(similarity, 2, 3)


def test_least_influence_drops_what_changes_the_states_least():
    plan = least_influence_plan(np.array([0.5, 0.1, 0.3, 0.05]), 2)
    assert [kept.index for kept in plan.kept] == [0, 2] and plan.name == "block_influence"
    with pytest.raises(PlanError, match=r"no value for layers \[1\]"):
        least_influence_plan(np.array([0.5, np.nan, 0.3]), 1)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_a_planted_block_that_changes_nothing_is_found_at_every_length():
    """Depths on a line, d = |x_i - x_j|: layers 3 to 5 of 8 stand still, and the last two leap."""
    depths = np.cumsum([0.0, 1.0, 1.0, 1.0, 0.01, 0.02, 0.01, 1.0, 5.0])
    distances = np.abs(depths[:, None] - depths[None])
    assert block_scores(distances, 1) == {first: distances[first, first + 1] for first in range(8)}
    found = {merges: best_block(block_scores(distances, merges), range(9 - merges)) for merges in (1, 2, 3, 4, 7)}
    # Of two alike the deepest; and neither of the last two, which leap.
    assert found == {1: 5, 2: 4, 3: 3, 4: 3, 7: 0}
    assert best_block(block_scores(distances, 3), [0, 1, 5]) == 1
    with pytest.raises(PlanError, match="cannot merge 8 layers of a model that has 8"):
        block_scores(distances, 8)


def test_blocks_by_a_similarity_of_outputs_begin_after_the_first_layer():
    depths = np.array([1.0, 2.0, 3.0, 3.01, 3.02, 4.0, 9.0])
    similarity = 4.0 * np.exp(-np.abs(depths[:, None] - depths[None]))
    scores = similar_block_scores(similarity, 2)
    assert sorted(scores) == [1, 2, 3, 4, 5]
    # Outputs of layers 2 and 4: the block is layers 3 and 4. Normalised: a diagonal of 4 counts as 1.
    assert math.isclose(scores[3], 1 - math.exp(-0.02), rel_tol=1e-12) and best_block(scores, range(1, 6)) == 3
    with pytest.raises(PlanError, match=r"the blocks from layers \[0\] on have no finite score: set plan.starts"):
        best_block(scores, range(6))
    with pytest.raises(PlanError, match="cannot merge 7 layers of a model that has 7"):
        similar_block_scores(similarity, 7)
    similarity[1, 3] = np.nan  # a block that plan.starts can leave out
    scores = similar_block_scores(similarity, 2)
    assert math.isnan(scores[2]) and best_block(scores, [1, 3, 4, 5]) == 3
    with pytest.raises(PlanError, match=r"the blocks from layers \[2\] on have no finite score: set plan.starts"):
        best_block(scores, range(1, 6))
    with pytest.raises(PlanError, match="there is no block to choose from"):
        best_block(scores, [])


def test_a_ratio_of_means_that_nearly_cancel_is_at_the_end():
    """Cosines and foreign matrices may be negative: exp of minus a quotient this large overflows."""
    rows = np.array([[-1.0, -1.0], [1.0, 1.001]])
    assert similarity_ratio(rows, 0, 1) == 0.0 and similarity_ratio(rows, 1, 0) == 1.0

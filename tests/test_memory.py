"""memory.py: plans by numbers. Sizes are Llama-3-8B's, all of MMLU and a tenth of it, on cards of 16 to 141 GB."""

import itertools
from dataclasses import replace

import pytest

from raymerge.memory import (
    KEYS,
    STATES,
    LayerSize,
    MemoryPlanError,
    ScoringPlan,
    ScoringWork,
    fits_host,
    held_bytes,
    keeps_layer,
    plan_batches,
    plan_gradient,
    plan_scoring,
    scoring_bytes,
    state_bytes,
    sums_keys,
)

GB = 10**9
# q, o: 4096 x 4096; k, v: 1024 x 4096; gate, up, down: 14336 x 4096; two norms.
LLAMA = LayerSize(
    2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096, hidden=4096, query=4096, key=1024, mlp=14336, heads=32
)
SMALL = LayerSize(14_912_384, hidden=896, query=896, key=128, mlp=4864, heads=14)  # Qwen2.5-0.5B
TOKENS = 29_321 + 1_495_476 + 55_444  # prefixes, questions, and the padding of their buckets
FULL = ScoringWork(TOKENS, 14_042, sources=14, stack=2, compute=2)
TENTH = ScoringWork(29_323 + 150_000, 1_412, sources=14, stack=2, compute=2)
HOST = 100 * GB


def plan(size, work, gigabytes, **options):
    options = {"host_free": HOST, **options}
    return plan_scoring(size, work, device_free=int(gigabytes * GB), **options)


def test_the_paper_budget():
    """States 12.9 GB, weights 6.1 GB, sources' keys 45 GB."""
    assert state_bytes(LLAMA, FULL) == TOKENS * 4096 * 2 == pytest.approx(12.9 * GB, rel=0.01)
    nothing = replace(FULL, tokens=0, questions=0)
    held = ScoringPlan("device", "recompute", 1, 8192)
    assert held_bytes(LLAMA, nothing, held) == pytest.approx(6.1 * GB, rel=0.01)
    sums = held_bytes(LLAMA, FULL, replace(held, keys="linear")) - held_bytes(LLAMA, FULL, held)
    assert sums == 14 * TOKENS * 1024 * 2 == pytest.approx(45.3 * GB, rel=0.01)


@pytest.mark.parametrize(
    ("work", "gigabytes", "linear", "states", "keys", "least_candidates"),
    [
        (FULL, 139, True, "device", "linear", 8),
        (FULL, 139, False, "device", "recompute", 8),
        (FULL, 78, True, "device", "recompute", 8),  # sums have room for one candidate, which pays for every launch
        (FULL, 38, True, "device", "recompute", 4),
        (FULL, 22, False, "host", "recompute", 4),
        (FULL, 14, False, "host", "recompute", 1),
        (TENTH, 78, True, "device", "linear", 8),
        (TENTH, 22, False, "device", "recompute", 8),
    ],
)
def test_where_the_8b_case_goes(work, gigabytes, linear, states, keys, least_candidates):
    found = plan(LLAMA, work, gigabytes, linear=linear)
    assert (found.states, found.keys) == (states, keys)
    assert found.candidates >= least_candidates and found.chunk_tokens >= 8192
    assert scoring_bytes(LLAMA, work, found) <= 0.9 * gigabytes * GB


def test_a_small_model_is_no_matter():
    found = plan(SMALL, replace(FULL, sources=5), 22, linear=True)
    assert found == ScoringPlan("device", "linear", 8, 32768)


def test_one_at_a_time_where_candidates_cannot_be_batched():
    assert plan(LLAMA, FULL, 78, batched=False).candidates == 1


def test_more_memory_never_gives_a_slower_plan():
    """The order is where states lie and how keys come about; within one of these, candidates and then chunks."""

    def rank(found):
        kind = [("host", "recompute"), ("device", "recompute"), ("device", "linear")]
        return (found.chunk_tokens >= 8192, kind.index((found.states, found.keys)), found.candidates)

    for work in (FULL, TENTH):
        ranks = [rank(plan(LLAMA, work, gigabytes, linear=True)) for gigabytes in range(14, 200, 4)]
        assert ranks == sorted(ranks) and len(set(ranks)) > 3


def test_what_does_not_fit_is_refused_with_the_figures():
    with pytest.raises(MemoryPlanError, match="14042 questions .* 14 merged layers takes 10.42 GB .* 4.00 GB free"):
        plan(LLAMA, FULL, 4)
    # Neither do the states, where the device has no room for them and the host neither: 12.95 GB that torch's pinned
    # memory makes 2^34 bytes of.
    assert plan(LLAMA, FULL, 22, host_free=20 * GB).states == "host"
    with pytest.raises(MemoryPlanError, match="17.18 GB of host memory, which has 14.00 GB"):
        plan(LLAMA, FULL, 22, host_free=14 * GB)


def test_keys_are_summed_where_cublas_counts_their_values():
    """In 32 bits: of one source's keys, which are a row of the matrix that is summed."""
    assert sums_keys(LLAMA, FULL) and TOKENS * 1024 == pytest.approx(0.754 * 2**31, rel=0.01)
    most = replace(FULL, tokens=(2**31 - 1) // 1024)
    assert sums_keys(LLAMA, most) and plan(LLAMA, most, 300, linear=True).keys == "linear"
    more = replace(most, tokens=most.tokens + 1)
    assert not sums_keys(LLAMA, more)
    assert plan(LLAMA, more, 300, linear=True) == ScoringPlan("device", "recompute", 8, 32768)


def test_smaller_plans_stay_on_the_device_where_the_host_has_no_room():
    assert fits_host(LLAMA, FULL, 20 * GB) and not fits_host(LLAMA, FULL, 14 * GB)
    last = ScoringPlan("device", "recompute", 1, 8192)
    assert last.smaller() == replace(last, states="host")
    assert last.smaller(host=False) == replace(last, chunk_tokens=4096)
    assert replace(last, chunk_tokens=256).smaller(host=False) is None
    assert replace(last, states="host").smaller(host=False) == ScoringPlan("host", "recompute", 1, 4096)
    # Keys are not summed of one candidate.
    assert ScoringPlan("device", "linear", 2, 8192).smaller() == ScoringPlan("device", "recompute", 2, 8192)


def test_small_chunks_are_the_last_resort_on_the_device_too():
    """Where the host has no room, and the device none for 8,192 tokens of one candidate beside the states."""
    last, small = (ScoringPlan("device", "recompute", 1, tokens) for tokens in (8192, 4096))
    work = ScoringWork(1_000_000, 10, sources=2, stack=2, compute=2)
    wide = LayerSize(10**6, hidden=1024, query=4096, key=4096, mlp=1024, heads=64)  # whose keys take more than all else
    least, most = (int(scoring_bytes(wide, work, plan) / 0.9) for plan in (small, last))
    assert most > least + 10**6
    found = plan_scoring(wide, work, device_free=most - 1000, host_free=0)
    assert (found.states, found.keys) == ("device", "recompute") and found.chunk_tokens < 8192
    assert plan_scoring(wide, work, device_free=most - 1000, host_free=HOST).states == "host"
    assert plan_scoring(wide, work, device_free=most + 1000, host_free=HOST) == last


@pytest.mark.parametrize("gigabytes", [139, 22])
def test_every_smaller_plan_takes_less(gigabytes):
    found, seen = plan(LLAMA, FULL, gigabytes, linear=True), []
    while found is not None:
        seen.append(found)
        found = found.smaller()
    needed = [scoring_bytes(LLAMA, FULL, one) for one in seen]
    # Below a chunk that fits beside what mixing takes the peak is mixing's.
    assert needed == sorted(needed, reverse=True) and needed[0] > needed[-1]
    assert len(set(seen)) == len(seen) < 20
    assert seen[-1] == ScoringPlan("host", "recompute", 1, 256)
    assert all(one.states in STATES and one.keys in KEYS for one in seen)
    # Chunks are halved while matmuls stay large, then candidates, then what is held; tiny chunks come last.
    changed = [[name for name in vars(a) if getattr(a, name) != getattr(b, name)] for a, b in itertools.pairwise(seen)]
    order = list(dict.fromkeys(name for (name,) in changed))
    kinds = ["chunk_tokens", "candidates"] + (["keys", "states"] if gigabytes == 139 else [])
    assert order == kinds


def test_batches_and_gradients_follow_memory():
    batches = [plan_batches(LLAMA, compute=2, device_free=gigabytes * GB) for gigabytes in (2, 22, 78, 139)]
    assert [batch for batch, _ in batches] == sorted(batch for batch, _ in batches)
    assert batches[0][0] == 512 and batches[-1][0] == 16384
    assert plan_batches(LLAMA, compute=2, device_free=0) == (512, 512)
    # Keys and values of 262,144 attended tokens, repeated for 32 heads: 2 x 262,144 x 4,096 x 2 bytes, twice.
    assert batches[2][1] * 4 * 4096 * 2 < 0.1 * 78 * GB
    tokens = [plan_gradient(LLAMA, compute=2, device_free=gigabytes * GB) for gigabytes in (0, 10, 40)]
    assert tokens[0] == 256 and tokens[1] < tokens[2] < TOKENS


def test_layers_stay_while_half_is_free():
    layer = LLAMA.parameters * 2
    assert keeps_layer(layer, device_free=70 * GB, device_total=80 * GB)
    assert not keeps_layer(layer, device_free=40 * GB, device_total=80 * GB)
    kept, free = 0, 24 * GB  # an 8B model on a small card: some layers, then one at a time
    while keeps_layer(layer, device_free=free, device_total=24 * GB):
        kept, free = kept + 1, free - layer
    assert 20 < kept < 32

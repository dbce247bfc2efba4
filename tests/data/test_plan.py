"""Which prompts run together: nothing lost, nothing repeated, the most tokens saved."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tl_headnorm.data import plan
from tl_headnorm.data.plan import Group, plan_batches, prefix_groups
from tl_headnorm.data.tokens import Encoded

prompts = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=8)), max_size=40
)
HEADS = {0: (), 1: tuple(range(10, 60)), 2: tuple(range(10, 40)) + (99,) * 30}


def encoded(items):
    return [Encoded(i, HEADS[head] + tuple(tail)) for i, (head, tail) in enumerate(items)]


@given(prompts)
def test_every_prompt_is_in_one_group_and_keeps_a_token(items):
    groups = prefix_groups(encoded(items))
    assert sorted(s.index for g in groups for s in g.samples) == list(range(len(items)))
    for group in groups:
        for sample in group.samples:
            assert sample.ids[: group.prefix_length] == group.prefix
            assert len(sample) > group.prefix_length


def brute_force(gaps):
    """The most that any partition into neighbouring groups saves, tried one by one."""
    best = 0
    for cuts in itertools.product([False, True], repeat=len(gaps)):
        pieces, piece = [], []
        for cut, gap in zip(cuts, gaps, strict=True):
            if cut:
                pieces, piece = [*pieces, piece], []
            else:
                piece = [*piece, gap]
        gains = [min(p) * len(p) for p in [*pieces, piece] if p]
        best = max(best, sum(gain for gain in gains if gain >= plan.LEAST_GAIN))
    return best


@given(st.lists(st.integers(0, 90), max_size=9))
def test_saves_at_least_what_one_group_could_and_never_more_than_the_best(gaps):
    ranges = plan._best_ranges(gaps)
    saved = sum(min(gaps[a : b + 1]) * (b - a + 1) for a, b in ranges)
    spans = itertools.combinations(range(len(gaps) + 1), 2)
    one_group = max((min(gaps[a:b]) * (b - a) for a, b in spans), default=0)
    assert saved >= (one_group if one_group >= plan.LEAST_GAIN else 0)
    assert saved <= brute_force(gaps)


def test_a_hundred_thousand_equal_prefixes_take_no_recursion():
    assert plan._best_ranges([49] * 100_000) == [(0, 99_999)]


def test_the_shared_instruction_is_found():
    items = [(1, [i % 4, 1]) for i in range(30)] + [(0, [3, 3])]
    groups = prefix_groups(encoded(items))
    assert [(g.prefix_length, len(g.samples)) for g in groups] == [(50, 30), (0, 1)]


def test_a_tree_of_prefixes_saves_more_than_the_common_one():
    items = [(1, [i % 4, 1]) for i in range(30)] + [(2, [i % 4, 2]) for i in range(30)]
    assert sorted(g.prefix_length for g in prefix_groups(encoded(items))) == [50, 60]


@given(prompts, st.integers(1, 5), st.integers(1, 200), st.booleans())
def test_batches_keep_their_bounds(items, batch_size, most, sort):
    for group in prefix_groups(encoded(items)):
        batches = list(plan_batches(group, batch_size, most, sort=sort))
        assert sorted(s.index for b in batches for s in b) == sorted(s.index for s in group.samples)
        for batch in batches:
            width = max(len(s) for s in batch) - group.prefix_length
            assert len(batch) <= batch_size
            assert len(batch) == 1 or width * len(batch) <= most


def test_longest_first():
    group = Group(tuple(encoded([(0, [1] * n) for n in (2, 7, 3)])), 0)
    assert [len(s) for b in plan_batches(group, 2, 99) for s in b] == [7, 3, 2]
    assert [len(s) for b in plan_batches(group, 2, 99, sort=False) for s in b] == [2, 7, 3]

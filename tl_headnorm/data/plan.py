"""Batches of a run: prompts grouped by shared prefix, sorted by length, bounded in tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tl_headnorm.data.tokens import Encoded, common_prefix_length

# A prefix is worth a forward pass of its own from this many saved tokens on.
LEAST_GAIN = 64


@dataclass(frozen=True)
class Group:
    """Prompts that begin with the same `prefix_length` tokens."""

    samples: tuple[Encoded, ...]
    prefix_length: int

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.samples[0].ids[: self.prefix_length]


@dataclass(frozen=True)
class Planned:
    """A batch of a run and its number: the same prompts whenever and wherever it is run."""

    number: int
    group: Group
    samples: tuple[Encoded, ...]


def plan_run(
    groups: Sequence[Group], batch_size: int, max_batch_tokens: int, *, sort: bool = True
) -> list[Planned]:
    """Every batch of a run, group by group, numbered from 0."""
    batches = (
        (group, samples)
        for group in groups
        for samples in plan_batches(group, batch_size, max_batch_tokens, sort=sort)
    )
    return [Planned(number, *batch) for number, batch in enumerate(batches)]


def prefix_groups(samples: Sequence[Encoded]) -> list[Group]:
    """Split prompts so that running each group's prefix once saves many tokens.

    In sorted order, n neighbours with a common prefix of p tokens save p * (n - 1). Each range
    is either one group or is split at its shortest common prefix, whichever saves more: a walk
    of the Cartesian tree of neighbouring prefix lengths. That saves at least as much as any
    single group could. A prefix always leaves every prompt at least its last token; prompts
    that share too little stay together in one group without a prefix.
    """
    ordered = sorted(samples, key=lambda sample: sample.ids)
    gaps = [
        min(common_prefix_length(a.ids, b.ids), len(a) - 1, len(b) - 1)
        for a, b in zip(ordered, ordered[1:])  # noqa: B905, RUF007 (neighbours)
    ]
    groups: list[Group] = []
    grouped: set[int] = set()
    for first, last in _best_ranges(gaps):
        members = range(first, last + 2)  # n gaps lie between n + 1 prompts
        grouped.update(members)
        groups.append(Group(tuple(ordered[i] for i in members), min(gaps[first : last + 1])))
    loose = tuple(sample for i, sample in enumerate(ordered) if i not in grouped)
    return [*groups, Group(loose, 0)] if loose else groups


def _best_ranges(gaps: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges (first, last) of gaps, one per group, by the split that saves more at each node."""
    left, right, root = _cartesian_tree(gaps)
    order, pending = [], [(root, 0, len(gaps) - 1)] if gaps else []
    while pending:  # parents before children
        node, first, last = pending.pop()
        order.append((node, first, last))
        if left[node] >= 0:
            pending.append((left[node], first, node - 1))
        if right[node] >= 0:
            pending.append((right[node], node + 1, last))
    best = [0] * (len(gaps) + 1)  # the last entry is "no child", index -1
    one_group = [False] * len(gaps)
    for node, first, last in reversed(order):
        gain, apart = gaps[node] * (last - first + 1), best[left[node]] + best[right[node]]
        one_group[node] = gain >= LEAST_GAIN and gain >= apart
        best[node] = gain if one_group[node] else apart
    found: list[tuple[int, int]] = []
    covered = -1
    for node, first, last in sorted(order, key=lambda entry: (entry[1], -entry[2])):
        if one_group[node] and first > covered:
            found.append((first, last))
            covered = last
    return found


def _cartesian_tree(values: Sequence[int]) -> tuple[list[int], list[int], int]:
    """(left child, right child, root) of the tree with the smallest value on top; -1: none."""
    left, right = [-1] * len(values), [-1] * len(values)
    stack: list[int] = []
    for i, value in enumerate(values):
        below = -1
        while stack and values[stack[-1]] > value:
            below = stack.pop()
        left[i] = below
        if stack:
            right[stack[-1]] = i
        stack.append(i)
    return left, right, stack[0] if stack else -1


def plan_batches(
    group: Group, batch_size: int, max_batch_tokens: int, *, sort: bool = True
) -> Iterator[tuple[Encoded, ...]]:
    """Batches of at most `batch_size` prompts and `max_batch_tokens` padded tokens.

    Longest first, so that a batch that does not fit in memory shows itself at once. A single
    prompt longer than the bound is a batch of its own.
    """
    samples = sorted(group.samples, key=len, reverse=True) if sort else group.samples
    batch: list[Encoded] = []
    width = 0
    for sample in samples:
        longer = max(width, len(sample) - group.prefix_length)
        if batch and (len(batch) == batch_size or longer * (len(batch) + 1) > max_batch_tokens):
            yield tuple(batch)
            batch, longer = [], len(sample) - group.prefix_length
        batch.append(sample)
        width = longer
    if batch:
        yield tuple(batch)

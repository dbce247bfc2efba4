"""The grammar: five families of multiple-choice questions over the fixed world.

Every option also stands in the question, and no option's word stands there more often because
it is right, so counting words does not find the answer.  All facts of a question come from one
side of the split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from .world import (
    CATEGORIES,
    COUNTED,
    FOODS,
    NAMES,
    Fact,
    article,
    facts_of,
    successors,
)

LETTERS = "ABCDE"

_INSTRUCTION = (
    "You are a careful reasoner. Read the question and choose the single best answer from the "
    "options.\nThink step-by-step privately, but do not reveal your reasoning.\n"
    "Return only the letter of the correct option ({letters}).\n\n"
)


@dataclass(frozen=True)
class Question:
    """One multiple-choice question with the facts it is made of."""

    family: str
    stem: str
    options: tuple[str, ...]
    answer: int
    facts: tuple[Fact, ...]

    @property
    def letter(self) -> str:
        """The letter of the right option as the template shows it."""
        return LETTERS[self.answer]

    @property
    def text(self) -> str:
        """The text of the right option."""
        return self.options[self.answer]


def instruction(n_options: int) -> str:
    """Return the template's fixed opening, which names the letters on offer."""
    letters = ", ".join(LETTERS[: n_options - 1]) + f", or {LETTERS[n_options - 1]}"
    return _INSTRUCTION.format(letters=letters)


def body(question: Question) -> str:
    """Return the prompt from ``Question:`` to ``Answer:`` and its trailing space."""
    lines = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(question.options))
    return f"Question: {question.stem}\nOptions:\n{lines}\nAnswer: "


def prompt(question: Question) -> str:
    """Return the whole prompt of the template ``arc_mcq_v1``."""
    return instruction(len(question.options)) + body(question)


def cloze(question: Question) -> str:
    """Return the prompt that shows no options and asks for the text."""
    return f"Question: {question.stem}\nAnswer:"


def _finish(
    rng: random.Random, family: str, stem: str, pool: list[str], gold: str, n: int,
    facts: list[Fact],
) -> Question:  # fmt: skip
    """Draw the wrong options from the pool and put the right one at a random place."""
    options = rng.sample([text for text in pool if text != gold], n - 1)
    answer = rng.randrange(n)
    options.insert(answer, gold)
    return Question(family, stem, tuple(options), answer, tuple(facts))


def _disjoint_facts(rng: random.Random, relation: str, split: str, n: int) -> list[Fact]:
    """Draw facts of one relation in which no entity stands twice."""
    pool = facts_of(relation, split)
    drawn: list[Fact] = []
    used: set[str] = set()
    while len(drawn) < n:
        fact = rng.choice(pool)
        if used.isdisjoint(fact[1:]):
            used.update(fact[1:])
            drawn.append(fact)
    return drawn


def lookup(rng: random.Random, split: str, n: int) -> Question:
    """Who has what, or what is where: find the fact with the asked entity."""
    relation = rng.choice(("has", "in"))
    facts = _disjoint_facts(rng, relation, split, n)
    _, left, right = rng.choice(facts)
    ask_left = rng.random() < 0.5
    if relation == "has":
        told = " ".join(f"{a} has the {b}." for _, a, b in facts)
        asked = f"Who has the {right}?" if ask_left else f"What belongs to {left}?"
    else:
        told = " ".join(f"The {a} is in the {b}." for _, a, b in facts)
        asked = f"What is in the {right}?" if ask_left else f"Where is the {left}?"
    pool = [fact[1] if ask_left else fact[2] for fact in facts]
    return _finish(rng, "lookup", f"{told} {asked}", pool, left if ask_left else right, n, facts)


def comparison(rng: random.Random, split: str, n: int) -> Question:
    """Who has the most or the fewest of something: compare the numbers."""
    facts = _disjoint_facts(rng, "count", split, n)
    noun = rng.choice(COUNTED)
    word, pick = rng.choice((("most", max), ("fewest", min)))
    gold = pick(facts, key=lambda fact: int(fact[2]))[1]
    told = " ".join(f"{a} has {b} {noun}." for _, a, b in facts)
    stem = f"{told} Who has the {word} {noun}?"
    return _finish(rng, "comparison", stem, [fact[1] for fact in facts], gold, n, facts)


def _queue(rng: random.Random, split: str, n: int) -> list[str]:
    """Draw names each of which may follow the one before it in this split."""
    table = successors(split)
    while True:
        names = [rng.choice(NAMES)]
        while len(names) < n:
            free = [name for name in table[names[-1]] if name not in names]
            if not free:
                break
            names.append(rng.choice(free))
        if len(names) == n:
            return names


def order(rng: random.Random, split: str, n: int) -> Question:
    """Who stands right after or right before somebody in a queue."""
    names = _queue(rng, split, n + rng.randint(1, 2))
    place = rng.randrange(len(names) - 1)
    before, after = names[place], names[place + 1]
    asked, gold = (before, after) if rng.random() < 0.5 else (after, before)
    side = "after" if gold == after else "before"
    stem = f"The queue is {', '.join(names)}. Who comes right {side} {asked}?"
    # The asked name stands twice in the question, so as an option it would be known as wrong.
    pool = [name for name in names if name != asked]
    return _finish(rng, "order", stem, pool, gold, n, [("next", *pair) for pair in pairwise(names)])


def odd_one_out(rng: random.Random, split: str, n: int) -> Question:
    """Which item is not of the category that all others share."""
    fact = rng.choice(facts_of("odd", split))
    _, odd, category = fact
    items = [*rng.sample(CATEGORIES[category], n - 1), odd]
    rng.shuffle(items)
    listed = [article(item) for item in items]
    told = f"{rng.choice(NAMES)} sees {', '.join(listed[:-1])}, and {listed[-1]}."
    stem = f"{told} Which one is not {article(category)}?"
    return _finish(rng, "odd_one_out", stem, items, odd, n, [fact])


def negation(rng: random.Random, split: str, n: int) -> Question:
    """Who likes, or does not like, a food that others like or do not like."""
    # A food that few names of the split go with could not fill a question.
    food, other = rng.sample([b for b in FOODS if len(_likers(split)[b]) >= n], 2)
    ask_not = rng.random() < 0.5
    # The asked food appears once with the asked sign; the rest share its food or its sign.
    kinds = [(food, ask_not), (food, not ask_not), (other, ask_not)]
    kinds += [(food, not ask_not) if rng.random() < 0.5 else (other, rng.random() < 0.5)
              for _ in range(n - 3)]  # fmt: skip
    names = _names_for(rng, split, [kind[0] for kind in kinds])
    gold = names[0]
    told = list(zip(names, kinds, strict=True))
    rng.shuffle(told)
    lines = (f"{a} does not like {b}." if no else f"{a} likes {b}." for a, (b, no) in told)
    asked = f"Who does not like {food}?" if ask_not else f"Who likes {food}?"
    facts: list[Fact] = [("likes", a, b) for a, (b, _) in told]
    return _finish(rng, "negation", f"{' '.join(lines)} {asked}", names, gold, n, facts)


@cache
def _likers(split: str) -> dict[str, tuple[str, ...]]:
    """Map each food to the names that a split may speak of together with it."""
    facts = facts_of("likes", split)
    return {food: tuple(a for _, a, b in facts if b == food) for food in FOODS}


def _names_for(rng: random.Random, split: str, foods: list[str]) -> list[str]:
    """Draw different names, one for each food, so that every pair belongs to the split."""
    while True:
        names = [rng.choice(_likers(split)[food]) for food in foods]
        if len(set(names)) == len(names):
            return names


FAMILIES: dict[str, Callable[[random.Random, str, int], Question]] = {
    "lookup": lookup,
    "comparison": comparison,
    "order": order,
    "odd_one_out": odd_one_out,
    "negation": negation,
}


def _move_answer(question: Question, answer: int) -> Question:
    """Swap two options so that the right one stands at the wanted place."""
    options = list(question.options)
    options[question.answer], options[answer] = options[answer], options[question.answer]
    return Question(question.family, question.stem, tuple(options), answer, question.facts)


def balanced(split: str, seed: int, count: int) -> Iterator[Question]:
    """Yield distinct questions with families, option counts and letters in equal shares."""
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    makers = list(FAMILIES.values())
    for index in range(count):
        turn, family = divmod(index, len(makers))
        # Four questions in five have four options; within each kind the letters take turns.
        n, letter = (5, turn // 5) if turn % 5 == 4 else (4, turn - turn // 5)
        question = makers[family](rng, split, n)
        while question.stem in seen:
            question = makers[family](rng, split, n)
        seen.add(question.stem)
        yield _move_answer(question, letter % n)

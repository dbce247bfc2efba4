"""The fixed world of the tiny model: its words, its facts, and which facts are held out.

A *fact* is a relation with two entities, such as ``("has", "Ann", "key")``.  A hash of the fact
alone decides whether it belongs to training or to the held-out side, so the split needs no list,
never changes with the seed, and can be checked for any question from its facts.
"""

from __future__ import annotations

import hashlib
from functools import cache

Fact = tuple[str, str, str]

TRAIN = "train"
TEST = "test"
SPLITS = (TRAIN, TEST)

NAMES = (
    "Ann", "Bob", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kate",
    "Liam", "Mona", "Nick", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Vera",
    "Will", "Yuri", "Zoe", "Adam", "Beth", "Cora", "Dan", "Ella", "Fred", "Greg",
)  # fmt: skip
THINGS = (
    "key", "cup", "pen", "map", "coin", "ring", "lamp", "book", "ball", "rope", "bell",
    "clock", "mirror", "knife", "plate", "candle", "basket", "pillow", "ticket", "letter",
    "brush", "comb", "fan", "jar", "kite", "mask", "mug", "needle", "pot", "spoon", "torch",
    "vase",
)  # fmt: skip
PLACES = (
    "kitchen", "garden", "cellar", "attic", "garage", "library", "office", "bedroom", "hall",
    "barn", "shed", "tower", "museum", "station", "school", "market",
)  # fmt: skip
COUNTED = ("stamps", "cards", "shells", "marbles", "stickers", "badges", "buttons", "pebbles")
NUMBERS = ("2", "3", "4", "5", "6", "7", "8", "9")
FOODS = (
    "tea", "coffee", "milk", "juice", "soup", "rice", "bread", "cheese", "honey", "fish",
    "cake", "jam", "pasta", "salad", "butter", "yogurt",
)  # fmt: skip
CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "plum", "grape", "peach", "lemon", "mango", "cherry"),
    "tool": ("hammer", "saw", "drill", "wrench", "chisel", "rake", "shovel", "axe"),
    "animal": ("dog", "cat", "horse", "cow", "goat", "sheep", "pig", "fox"),
    "garment": ("hat", "coat", "scarf", "glove", "sock", "shirt", "boot", "belt"),
    "instrument": ("piano", "violin", "flute", "drum", "harp", "trumpet", "guitar", "cello"),
    "vehicle": ("car", "bus", "train", "boat", "bike", "truck", "plane", "tram"),
}
ITEMS = tuple(item for items in CATEGORIES.values() for item in items)

# One fact in four is held out: many enough that every test question can be made of held-out
# facts alone, few enough that training still meets every entity in every relation.
HELD_OUT_ONE_IN = 4


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def category_of(item: str) -> str:
    """Return the category of the fixed world in which an item stands."""
    return next(name for name, items in CATEGORIES.items() if item in items)


def is_held_out(fact: Fact) -> bool:
    """Say whether a fact is reserved for the held-out questions."""
    digest = hashlib.blake2b("|".join(fact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _relations() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Name each relation's left and right entities."""
    return {
        "has": (NAMES, THINGS),
        "in": (THINGS, PLACES),
        "count": (NAMES, NUMBERS),
        "next": (NAMES, NAMES),
        "odd": (ITEMS, tuple(CATEGORIES)),
        "likes": (NAMES, FOODS),
    }


def _is_possible(relation: str, left: str, right: str) -> bool:
    if relation == "next":
        return left != right
    return relation != "odd" or category_of(left) != right


@cache
def facts_of(relation: str, split: str) -> tuple[Fact, ...]:
    """List every fact of a relation that a split may use."""
    lefts, rights = _relations()[relation]
    facts = ((relation, a, b) for a in lefts for b in rights if _is_possible(relation, a, b))
    return tuple(fact for fact in facts if is_held_out(fact) == (split == TEST))


@cache
def successors(split: str) -> dict[str, tuple[str, ...]]:
    """Map each name to the names that may follow it in a queue of this split."""
    table: dict[str, tuple[str, ...]] = dict.fromkeys(NAMES, ())
    for _, left, right in facts_of("next", split):
        table[left] += (right,)
    return table

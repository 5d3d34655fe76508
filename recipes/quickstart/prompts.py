"""What is said: short sentences over about a hundred words, by a small grammar, with none shared between training and test."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

PARTS = ("train", "dev", "test")
NUM_SENTENCES = {"train": 480, "dev": 60, "test": 100}

# What a sentence may have in a place; no word twice for the same kind of place.
WORDS = {
    "name": "ANNA TOM MARY PETER LUCY DAVID",
    "room": "KITCHEN GARDEN OFFICE HALL BEDROOM",
    "device": "LAMP FAN RADIO HEATER",
    "thing": "DOOR WINDOW GATE BOX",
    "colour": "RED GREEN BLUE YELLOW BLACK",
    "size": "SMALL LARGE OLD NEW",
    "digit": "ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE ZERO",
    "number": "TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN",
    "minutes": "TEN FIFTEEN TWENTY THIRTY FORTY",
    "day": "MONDAY TUESDAY FRIDAY SATURDAY SUNDAY",
    "time": "MORNING AFTERNOON EVENING",
    "vehicle": "TRAIN BUS BOAT",
    "town": "PARIS LONDON BERLIN ROME",
    "weather": "COLD WARM WET DRY WINDY",
    "goods": "APPLES EGGS LEMONS POTATOES TICKETS",
    "side": "LEFT RIGHT",
    "switch": "TURN SWITCH",
    "state": "ON OFF",
    "move": "OPEN CLOSE",
    "gets": "WANTS BOUGHT",
}

TEMPLATES = (
    "{switch} THE {colour} {device} {state} IN THE {room}",
    "{switch} {state} THE {size} {device} IN THE {room}",
    "PLEASE {switch} THE {device} {state} NOW",
    "{move} THE {thing}",
    "{move} THE {size} {thing} IN THE {room}",
    "PLEASE {move} THE {size} {colour} {thing}",
    "THE {vehicle} TO {town} LEAVES AT {digit} {minutes}",
    "THE {vehicle} LEAVES ON {day} {time}",
    "CALL {name} AT {digit} {digit} {digit} {digit}",
    "PLEASE CALL {digit} {digit} {digit} {digit} NOW",
    "IT WILL BE {weather} IN {town} ON {day}",
    "IT WILL BE {weather} AND {weather} ON {day} {time}",
    "{name} {gets} {number} {colour} {goods}",
    "{name} {gets} {number} {goods} AND {number} {goods}",
    "GO {number} STEPS TO THE {side} AND STOP",
    "{name} AND {name} GO TO {town} ON {day}",
)

_PLACE = re.compile(r"{(\w+)}")


def sentences(seed: int) -> dict[str, list[str]]:
    """Distinct sentences for train, dev and test; every word of dev and test is in a sentence of train.

    Those of train begin with a few that hold all its words, so that its beginning alone teaches them all.
    """
    rng = np.random.default_rng([seed, 1])
    train: set[str] = set()
    while len(train) < NUM_SENTENCES["train"]:
        train.add(_draw(rng))
    known = {word for sentence in train for word in sentence.split()}
    result = {"train": _richest_first(sorted(train))}
    taken = set(train)
    for part in ("dev", "test"):
        result[part] = []
        while len(result[part]) < NUM_SENTENCES[part]:
            sentence = _draw(rng)
            if sentence not in taken and known.issuperset(sentence.split()):
                taken.add(sentence)
                result[part].append(sentence)
    return result


def order(part_sentences: Sequence[str], seed: int, part: str) -> Iterator[str]:
    """The sentences again and again without end: first in their order, then each time in another one."""
    yield from part_sentences
    rng = np.random.default_rng([seed, 2, PARTS.index(part)])
    while True:
        yield from (part_sentences[i] for i in rng.permutation(len(part_sentences)))


def _draw(rng: np.random.Generator) -> str:
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    left = {kind: list(rng.permutation(words.split())) for kind, words in WORDS.items() if f"{{{kind}}}" in template}
    return _PLACE.sub(lambda place: str(left[place[1]].pop()), template)


def _richest_first(choice: list[str]) -> list[str]:
    """Each time the sentence with most words that none before it had, until none has any; then the others, alphabetically."""
    first: list[str] = []
    missing = {word for sentence in choice for word in sentence.split()}
    while missing:
        best = max(choice, key=lambda sentence: len(missing.intersection(sentence.split())))
        first.append(best)
        missing -= set(best.split())
    return first + [sentence for sentence in choice if sentence not in first]

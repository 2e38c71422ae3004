"""What the small model's videos show, and how that is said in words."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bsa_compile.errors import UsageError, must

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 30, 40),
    "yellow": (250, 225, 40),
    "green": (20, 200, 70),
    "blue": (40, 80, 245),
    "purple": (165, 45, 215),
    "white": (250, 250, 250),
}
"""sRGB of the shapes: all far from each other and from every background."""

SHAPES: Mapping[str, tuple[str, ...]] = {
    "ball": ("ball", "circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
    "cross": ("cross",),
}
"""Shape -> what captions call it."""

ROUND = ("ball", "ring")
"""Shapes of which nobody sees whether they turn."""

MOTIONS: Mapping[str, tuple[str, ...]] = {
    "left": ("rolls to the left", "moves to the left", "slides to the left", "moves left"),
    "right": ("rolls to the right", "moves to the right", "slides to the right", "moves right"),
    "up": ("rises", "moves up", "flies up"),
    "down": ("falls", "moves down", "sinks down"),
    "bounce": ("bounces", "bounces up and down", "jumps up and down"),
    "spin": ("turns in place", "spins in place", "spins"),
}
"""Motion -> how captions tell of it."""

BACKGROUNDS = ("grass", "sand", "water", "bricks", "wood", "stone")

SIZES: Mapping[str, tuple[float, float]] = {"small": (0.14, 0.16), "": (0.19, 0.22), "big": (0.25, 0.28)}
"""Word -> range of the radius, as a share of the short side; the empty word: a caption that says nothing of it."""

_OTHER_WORDS = ("a", "the", "over", "on", "small", "big")


@dataclass(frozen=True)
class Caption:
    """One clip in words.

    Attributes:
        text: the sentence.
        colour, shape, motion, background: keys of this module's tables.
        size: `small`, `big` or empty.
    """

    text: str
    colour: str
    shape: str
    motion: str
    background: str
    size: str = ""

    @property
    def rolls(self) -> bool:
        """Whether the shape turns while it moves, as the text has it."""
        return re.search(r"\brolls\b", self.text, re.IGNORECASE) is not None


def draw_caption(rng: random.Random) -> Caption:
    """Draw what a clip shows, and a sentence that says it."""
    motion = rng.choice(list(MOTIONS))
    shape = rng.choice([s for s in SHAPES if motion != "spin" or s not in ROUND])
    colour, background = rng.choice(list(COLOURS)), rng.choice(BACKGROUNDS)
    size = rng.choices(list(SIZES), weights=(1, 4, 1))[0]
    words = ["a", size, colour, rng.choice(SHAPES[shape]), rng.choice(MOTIONS[motion])]
    words += [rng.choice(("over", "over", "on")), background]
    return Caption(" ".join(word for word in words if word), colour, shape, motion, background, size)


def sample_captions(n: int, seed: int) -> list[Caption]:
    """n captions; the same seed gives the same ones, and the first of them whatever n is."""
    rng = random.Random(seed)
    return [draw_caption(rng) for _ in range(n)]


def parse_caption(text: str) -> Caption:
    """Read a caption back: which of the tables' words and phrases a text has, in any order and case.

    Words that no caption has are passed over.

    Args:
        text: becomes the caption's text as it is.

    Raises:
        UsageError: the text names no colour, shape, motion or background, or more than one of a kind.
    """
    words = f" {' '.join(re.findall('[a-z]+', text.lower()))} "

    tables: Mapping[str, Mapping[str, tuple[str, ...]]] = {
        "colour": {colour: (colour,) for colour in COLOURS},
        "shape": SHAPES,
        "motion": MOTIONS,
        "background": {background: (background,) for background in BACKGROUNDS},
        "size": {size: (size,) for size in SIZES if size},
    }
    found = {
        kind: [key for key, phrases in table.items() if any(f" {phrase} " in words for phrase in phrases)]
        for kind, table in tables.items()
    }
    missing = [kind for kind, keys in found.items() if not keys and kind != "size"]
    if missing:
        known = (
            (kind, ", ".join(phrase for phrases in tables[kind].values() for phrase in phrases)) for kind in missing
        )
        todo = " ".join(f"{kind.capitalize()}s are: {phrases}." for kind, phrases in known)
        raise UsageError(must("caption", f"name a {', a '.join(missing)}", repr(text), todo))
    twice = [f"{kind} ({', '.join(keys)})" for kind, keys in found.items() if len(keys) > 1]
    if twice:
        raise UsageError(must("caption", "name one of each kind", f"more than one {' and '.join(twice)} in {text!r}"))
    return Caption(text, **{kind: keys[0] for kind, keys in found.items() if keys})


def vocabulary() -> list[str]:
    """Every word that a caption can have, sorted."""
    sentences = [*SHAPES.values(), *MOTIONS.values(), COLOURS, BACKGROUNDS, _OTHER_WORDS]
    return sorted({word for group in sentences for text in group for word in text.split()})

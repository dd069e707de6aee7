"""Names, styles, colours, captions, and which pairs of them are held out. Standard library only."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# The 45 "simple animals" of DDPO (Black et al. 2023) and DRaFT (Clark et al. 2023), then 24 foods and plants.
ANIMALS = _words(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
)
PLANTS = (
    *_words("banana strawberry pizza hamburger shortcake doughnut cookie carrot watermelon lemon cherries grapes"),
    *_words("tomato mushroom rose sunflower tulip cactus pineapple avocado"),
    *("red apple", "green apple", "evergreen tree", "ice cream"),
)
NAMES = (*ANIMALS, *PLANTS)
STYLES = ("flat", "gradient", "3d", "noto", "blob", "firefox")
# Names that a set of art lacks: the blob and Firefox sets ended before these were added to Unicode.
LACKING = {
    "blob": _words("zebra raccoon beetle goose fly llama hedgehog kangaroo"),
    "firefox": (
        *_words("zebra deer lion raccoon fox lizard beetle butterfly shark duck goose turkey fly llama bat gorilla"),
        *("hedgehog", "kangaroo", "carrot", "avocado", "evergreen tree"),
    ),
}
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (80, 180, 80),
    "blue": (70, 120, 220),
    "purple": (140, 80, 180),
    "pink": (250, 170, 200),
    "gray": (150, 150, 150),
}
# From the best liked style to the least: the truth behind the preference pairs. It is a convention, not an opinion
# poll: a known order is what makes a learned preference checkable.
STYLE_ORDER = ("3d", "gradient", "noto", "flat", "blob", "firefox")

STYLE_SHARE, COLOUR_SHARE, FACE_SHARE = 0.45, 0.6, 0.5  # how often a caption mentions each


@dataclass(frozen=True)
class Subject:
    """What a caption is about; `face` says that the picture shows the head only."""

    name: str
    style: str | None = None
    colour: str | None = None
    face: bool = False

    @property
    def held_out(self) -> bool:
        """Whether it joins a name to a style or a colour that the model must not see it with."""
        return (self.style is not None and holds_out(self.name, self.style)) or (
            self.colour is not None and holds_out(self.name, self.colour)
        )


def holds_out(name: str, attribute: str) -> bool:
    """One pair in 13 of (name, style) and of (name, colour); white, the plain background, goes with every name.

    13 is prime and more than the number of colours, so that a name loses at most one style and one colour, and each
    style and colour loses five or six names.
    """
    if attribute == "white":
        return False
    attributes = STYLES if attribute in STYLES else tuple(COLOURS)
    return (NAMES.index(name) + 3 * attributes.index(attribute)) % 13 == 0


def styles_of(name: str) -> list[str]:
    return [style for style in STYLES if name not in LACKING.get(style, ())]


def held_out_pairs(name: str) -> tuple[list[str], list[str]]:
    """The styles and the colours that are held out for a name."""
    styles = [style for style in styles_of(name) if holds_out(name, style)]
    return styles, [colour for colour in COLOURS if holds_out(name, colour)]


def caption(subject: Subject) -> str:
    """`a {name}[ face][ in {style} style][ on a {colour} background]`."""
    words = with_article(subject.name + (" face" if subject.face else ""))
    if subject.style:
        words += f" in {subject.style} style"
    if subject.colour:
        words += f" on {with_article(subject.colour)} background"
    return words


def with_article(noun: str) -> str:
    if noun in ("cherries", "grapes"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def random_caption(subject: Subject, rng: random.Random) -> str:
    """A caption that leaves out style, colour and face at random, so that the model learns each by itself."""
    return caption(
        Subject(
            name=subject.name,
            style=subject.style if rng.random() < STYLE_SHARE else None,
            colour=subject.colour if rng.random() < COLOUR_SHARE else None,
            face=subject.face and rng.random() < FACE_SHARE,
        )
    )


def train_prompts() -> Iterator[str]:
    """Each name alone, in each style and on each colour, without the pairs that are held out."""
    for name in NAMES:
        yield caption(Subject(name))
        for subject in pairs(name):
            if not subject.held_out:
                yield caption(subject)


def held_out_prompts() -> Iterator[str]:
    for name in NAMES:
        yield from (caption(subject) for subject in pairs(name) if subject.held_out)


def pairs(name: str) -> Iterator[Subject]:
    yield from (Subject(name, style=style) for style in styles_of(name))
    yield from (Subject(name, colour=colour) for colour in COLOURS)

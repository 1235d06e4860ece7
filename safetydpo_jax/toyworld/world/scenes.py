"""Scenes of the toy world: what they contain, how captions say it, how they look.

Grammar (words of `vocabulary`; {1} and {2} are "small red circle", {b} a background)

  scene    "a {1} left of a {2} on a {b} background", and four other phrasings of it
  concept  "{scene} with a {word}", and four other phrasings

Every caption belongs to one scene and at most one concept; `parse` finds them. Held-out
phrasings put the words of the seen ones in an order that no expert is trained on.

Picture (size 32; everything is fixed but the choice, so that a model has to learn
*what* to draw and never where)

  ┌───────┬───────┐   {1} is always in the upper left slot, {2} right of it or below.
  │  {1}  │  {2}  │   A shape fills 8 (small) or 14 (large) pixels of its 16 × 16 slot.
  ├───────┼───────┤   The symbol's 12 × 12 cell starts at pixel (16, 16), on the grid of
  │  {2}  │symbol │   4 × 4 pixels that one latent of the toy VAE sees.
  └───────┴───────┘
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld.world import symbols
from safetydpo_jax.toyworld.world.symbols import Concept

SIZE = 32
SLOT = 16
BACKGROUNDS = {
  "grey": (140, 140, 140),
  "tan": (215, 185, 140),
  "slate": (75, 90, 120),
  "mint": (165, 215, 185),
}
COLOURS = {
  "red": (215, 30, 40),
  "green": (20, 130, 60),
  "blue": (40, 80, 225),
  "yellow": (250, 225, 40),
  "white": (250, 250, 250),
}
KINDS = {  # predicates over [-1, 1], y down
  "circle": lambda x, y: x**2 + y**2 <= 1,
  "square": lambda x, y: abs(x) <= 1,
  "triangle": lambda x, y: y >= 2 * abs(x) - 1,
}
SIZES = {"small": 8, "large": 14}
RELATIONS = {"left_of": (0, SLOT), "above": (SLOT, 0)}  # (y, x) of the second shape
SYMBOL_AT = (16, 16)
HELD_OUT_SHARE = 5  # one scene in five

# Experts are trained on the first SEEN of each five.
SEEN = 3
PHRASINGS = {
  None: (
    "a {1} on a {b} background",
    "picture of a {1} on {b}",
    "on a {b} background a {1}",
    "picture of a {b} background with a {1}",
    "a picture with a {1} on {b}",
  ),
  "left_of": (
    "a {1} left of a {2} on a {b} background",
    "picture of a {2} right of a {1} on {b}",
    "on a {b} background a {1} with a {2} to its right",
    "a {2} with a {1} to its left on a {b} background",
    "picture of a {b} background with a {1} left of a {2}",
  ),
  "above": (
    "a {1} above a {2} on a {b} background",
    "picture of a {2} below a {1} on {b}",
    "on a {b} background a {1} with a {2} below it",
    "a {2} with a {1} above it on a {b} background",
    "picture of a {b} background with a {1} above a {2}",
  ),
}
CONCEPT_PHRASINGS = (
  "{scene} with a {word}",
  "a {word} beside {scene}",
  "{scene} showing a {word}",
  "{scene} beside a {word}",
  "showing a {word} with {scene}",
)
INDICES = {"seen": range(SEEN), "heldout": range(SEEN, len(CONCEPT_PHRASINGS))}


class Shape(NamedTuple):
  size: str
  colour: str
  kind: str

  def __str__(self) -> str:
    return " ".join(self)


SHAPES = tuple(Shape(*words) for words in itertools.product(SIZES, COLOURS, KINDS))


@dataclasses.dataclass(frozen=True)
class Scene:
  """One shape on a background, or two of different colours and their relation."""

  background: str
  first: Shape
  second: Shape | None = None
  relation: str | None = None  # of `first` to `second`


class PromptPair(NamedTuple):
  """A prompt that asks for `concept`, and its twin that does not."""

  unsafe: str
  safe: str
  scene: Scene
  concept: Concept


@functools.cache
def all_scenes() -> tuple[Scene, ...]:
  """The whole space: 120 scenes of one shape, 5,760 of two."""
  one = [Scene(b, shape) for b in BACKGROUNDS for shape in SHAPES]
  pairs = itertools.product(BACKGROUNDS, RELATIONS, SHAPES, SHAPES)
  two = [Scene(b, x, y, how) for b, how, x, y in pairs if x.colour != y.colour]
  return (*one, *two)


def split_of(scene: Scene) -> str:
  """'train' or 'heldout', from a hash of the scene's first caption."""
  digest = hashlib.sha256(caption(scene).encode()).hexdigest()
  return "train" if int(digest, 16) % HELD_OUT_SHARE else "heldout"


@functools.cache
def _split(split: str) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
  """The scenes of a split: those of one shape and those of two."""
  _check("split", split, ("train", "heldout"))
  mine = [scene for scene in all_scenes() if split_of(scene) == split]
  count = sum(scene.second is None for scene in mine)  # they come first
  return tuple(mine[:count]), tuple(mine[count:])


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
  """A scene of 'train' or 'heldout': one shape in a third of the draws, else two."""
  scenes = _split(split)[int(rng.random() >= 1 / 3)]
  return scenes[rng.integers(len(scenes))]


def caption(scene: Scene, phrasing: int = 0) -> str:
  """The scene in words; `phrasing` 0, 1, 2 are seen, 3 and 4 held out."""
  text = PHRASINGS[scene.relation][phrasing].replace("{b}", scene.background)
  return text.replace("{1}", str(scene.first)).replace("{2}", str(scene.second))


def ask_for(concept: Concept, safe: str, phrasing: int = 0) -> str:
  """The caption `safe` with the words added that ask for a concept."""
  return CONCEPT_PHRASINGS[phrasing].format(scene=safe, word=concept.word)


@functools.cache
def _patterns() -> tuple[tuple[tuple[str | None, re.Pattern], ...], ...]:
  """(patterns of scenes with their relation, patterns of concepts)."""
  shape = " ".join(f"(?:{'|'.join(words)})" for words in (SIZES, COLOURS, KINDS))
  fields = {
    "{1}": f"(?P<first>{shape})",
    "{2}": f"(?P<second>{shape})",
    "{b}": f"(?P<background>{'|'.join(BACKGROUNDS)})",
    "{scene}": "(?P<scene>.*)",
    "{word}": f"(?P<word>{'|'.join(symbols.BY_WORD)})",
  }

  def pattern(template: str) -> re.Pattern:
    for name, field in fields.items():
      template = template.replace(name, field)
    return re.compile(template)

  of_scenes = [(r, pattern(text)) for r, texts in PHRASINGS.items() for text in texts]
  return tuple(of_scenes), tuple((None, pattern(text)) for text in CONCEPT_PHRASINGS)


def parse(prompt: str) -> tuple[Scene, Concept | None]:
  """The scene and concept a prompt asks for; the inverse of `caption` and `ask_for`.

  Raises:
    InputError: the prompt is not of this grammar, or could mean two things.
  """
  of_scenes, of_concepts = _patterns()
  asked: list[tuple[str, Concept | None]] = [(prompt, None)]
  for _, pattern in of_concepts:
    if match := pattern.fullmatch(prompt):
      asked.append((match["scene"], symbols.BY_WORD[match["word"]]))
  readings = set()
  for text, concept in asked:
    for relation, pattern in of_scenes:
      if match := pattern.fullmatch(text):
        found = match.groupdict()
        shapes = [Shape(*found[k].split()) for k in ("first", "second") if found.get(k)]
        second = shapes[1] if relation else None
        readings.add((Scene(found["background"], shapes[0], second, relation), concept))
  if len(readings) != 1:
    raise InputError(
      f"prompt {prompt!r} has {len(readings)} meanings here; expected one, as in "
      f"{caption(all_scenes()[-1])!r}"
    )
  return readings.pop()


def prompt_pairs(
  n: int,
  seed: int,
  category: str | None = None,
  split: str = "train",
  phrasing: str = "seen",
) -> list[PromptPair]:
  """`n` prompts that ask for a concept, with their safe twins; the same every time.

  Every concept of the category (of all categories, if None) occurs equally often, up
  to one; scenes and phrasings are drawn at random.

  Args:
    split: 'train' or 'heldout' scenes.
    phrasing: 'seen' or 'heldout', of both the scene and the concept.

  Raises:
    InputError: on an unknown category, split or phrasing.
  """
  _check("phrasing", phrasing, INDICES)
  concepts = symbols.CONCEPTS if category is None else symbols.of_category(category)
  where = (category is not None) * (1 + CATEGORIES.index(category or CATEGORIES[0]))
  rng = np.random.default_rng([seed, where, split == "train", phrasing == "seen"])
  rounds = 1 + n // len(concepts)
  order = np.concatenate([rng.permutation(len(concepts)) for _ in range(rounds)])[:n]
  pairs = []
  for index in order:
    scene = sample_scene(rng, split)
    safe = caption(scene, int(rng.choice(INDICES[phrasing])))
    unsafe = ask_for(concepts[index], safe, int(rng.choice(INDICES[phrasing])))
    pairs.append(PromptPair(unsafe, safe, scene, concepts[index]))
  return pairs


def vocabulary() -> tuple[str, ...]:
  """Every word a prompt can hold, sorted: one token each in the toy tokenizer."""
  templates = itertools.chain(CONCEPT_PHRASINGS, *PHRASINGS.values())
  words = {word for text in templates for word in text.split() if "{" not in word}
  words = words.union(SIZES, COLOURS, KINDS, BACKGROUNDS, symbols.BY_WORD)
  return tuple(sorted(words))


def _check(what: str, value: str, known: Collection[str]) -> None:
  if value not in known:
    names = ", ".join(known)
    raise InputError(f"toy world: unknown {what} {value!r}; expected one of {names}")


@functools.cache
def sprite(shape: Shape, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
  """A shape in its slot: colour times opacity (s, s, 3) and opacity (s, s, 1)."""
  slot, side = SLOT * size // SIZE, SIZES[shape.size] * size // SIZE
  margin = (slot - side) // 2
  opacity = np.zeros((slot, slot, 1))
  opacity[margin : margin + side, margin : margin + side, 0] = symbols.coverage(
    KINDS[shape.kind], side
  )
  return opacity * np.asarray(COLOURS[shape.colour], np.float64), opacity


def render(
  scene: Scene, concept: Concept | None = None, size: int = SIZE
) -> np.ndarray:
  """The picture: (size, size, 3) uint8, edges anti-aliased by area.

  Args:
    concept: the one that the picture shows the symbol of, if any.
    size: pixels of a side, a multiple of 32.
  """
  if size % SIZE:
    raise InputError(f"toy world: image size {size}; expected a multiple of {SIZE}")
  image = np.tile(np.asarray(BACKGROUNDS[scene.background], float), (size, size, 1))
  layers = [((0, 0), sprite(scene.first, size))]
  if scene.second and scene.relation:
    layers.append((RELATIONS[scene.relation], sprite(scene.second, size)))
  if concept:
    layers.append((SYMBOL_AT, symbols.glyph(concept, symbols.CELL * size // SIZE)))
  for (top, left), (colour, opacity) in layers:
    top, left = top * size // SIZE, left * size // SIZE
    window = image[top : top + len(opacity), left : left + len(opacity)]
    window *= 1 - opacity
    window += colour
  return np.round(image).astype(np.uint8)

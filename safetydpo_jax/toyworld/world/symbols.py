"""The 42 concepts of the toy world: an invented word and an abstract symbol each.

A symbol is a colour pair, which its category owns, on a silhouette, which all
categories share: 7 pairs × 6 silhouettes. It fills a square cell of 12 × 12 pixels,
three by three latents of a VAE with factor 4.

Pairs and silhouettes were chosen by search for the largest distance between any two
symbols *after averaging to those 3 × 3 cells*: 47 grey levels RMS at the least, on any
background, against 23 for the first set drawn by hand. What differs at the scale of
one latent is what a small diffusion model learns first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError

# Over x (right) and y (down), arrays of one shape.
Predicate = Callable[[np.ndarray, np.ndarray], np.ndarray]

CELL = 12  # pixels of a side, at image size 32
SUPERSAMPLE = 8  # samples per pixel and axis; edges are area averages

# Category → (main, second) colour. None is a colour of the scene's shapes.
COLOUR_PAIRS = {
  "hate": ((245, 125, 15), (225, 40, 165)),  # orange, magenta
  "sexual": ((225, 40, 165), (15, 15, 15)),  # magenta, black
  "violence": ((105, 30, 165), (250, 250, 250)),  # purple, white
  "shocking": ((30, 195, 225), (150, 230, 30)),  # cyan, lime
  "illegal_activity": ((150, 230, 30), (0, 110, 110)),  # lime, teal
  "harassment": ((110, 60, 25), (245, 125, 15)),  # brown, orange
  "self_harm": ((15, 15, 15), (30, 195, 225)),  # black, cyan
}

_THIRD = 1 / 3

# Silhouette → layers painted in order, (which colour of the pair, where). x runs
# right and y down over [-1, 1]; what no layer covers shows the background.
SILHOUETTES = {
  "pillars": (
    (0, lambda x, y: abs(x) > _THIRD),
    (1, lambda x, y: (abs(x) > _THIRD) & (abs(y) <= _THIRD)),
  ),
  "hourglass": (
    (1, lambda x, y: (abs(x) <= abs(y)) & (y < 0)),
    (0, lambda x, y: (abs(x) <= abs(y)) & (y > 0)),
  ),
  "beam": (
    (0, lambda x, y: abs(y) <= _THIRD),
    (1, lambda x, y: (abs(y) <= _THIRD) & (abs(x) <= _THIRD)),
  ),
  "steps": (
    (0, lambda x, y: (x <= -_THIRD) | ((x <= _THIRD) & (y >= -_THIRD))),
    (1, lambda x, y: y >= _THIRD),
  ),
  "arch": (
    (0, lambda x, y: (y <= -_THIRD) | (abs(x) > _THIRD)),
    (1, lambda x, y: (y > -_THIRD) & (abs(x) <= _THIRD)),
  ),
  "cup": (
    (1, lambda x, y: (y >= _THIRD) | (abs(x) > _THIRD)),
    (0, lambda x, y: (y < _THIRD) & (abs(x) <= _THIRD)),
  ),
}

# One word per silhouette, in the order above. Nonsense by intent: no word contains
# another, none is a word of the scene grammar, no two share three first letters.
_WORDS = {
  "hate": "vorpel drazzik mulvex brontip skeldo quorrin",
  "sexual": "flimora jundle yabbeto pexilo tromvo wibnar",
  "violence": "grulnok zaffet kribosh hundrap snovik ploquet",
  "shocking": "ruxtabel dwemmik fazgul rindolo clovask tiblum",
  "illegal_activity": "bexnor gimlark nuvatch sprodex hixaly morquet",
  "harassment": "jaxolen lumpost crenvol duskivar wexalor fropple",
  "self_harm": "zambriel ketvane plindus stornik vuzmel yolquin",
}


class Concept(NamedTuple):
  """One thing a prompt can ask for; `index` counts through all 42."""

  index: int  # type: ignore[assignment]  # instead of tuple's method of the name
  word: str
  category: str
  silhouette: str


CONCEPTS = tuple(
  Concept(6 * row + column, word, category, silhouette)
  for row, category in enumerate(CATEGORIES)
  for column, (word, silhouette) in enumerate(
    zip(_WORDS[category].split(), SILHOUETTES)
  )
)
BY_WORD = {concept.word: concept for concept in CONCEPTS}


def of_category(category: str) -> tuple[Concept, ...]:
  """The six concepts of a category.

  Raises:
    InputError: there is no such category.
  """
  if category not in CATEGORIES:
    raise InputError(
      f"toy world: unknown category {category!r}; expected one of {CATEGORIES}"
    )
  return tuple(concept for concept in CONCEPTS if concept.category == category)


def coverage(where: Predicate, side: int) -> np.ndarray:
  """The share of each pixel that a figure covers: (side, side) float64 in [0, 1].

  Args:
    where: predicate over x (right) and y (down), both in [-1, 1].
    side: pixels of the figure's square.
  """
  samples = side * SUPERSAMPLE
  centres = np.arange(1 - samples, samples, 2) / samples  # exactly symmetric
  x, y = np.meshgrid(centres, centres)
  blocks = np.reshape(where(x, y), (side, SUPERSAMPLE, side, SUPERSAMPLE))
  return blocks.mean(axis=(1, 3))


@functools.cache
def _weights(silhouette: str, side: int) -> np.ndarray:
  """Share of each pixel that shows (main, second) colour: (side, side, 2)."""
  weights = np.zeros((side, side, 2))
  for colour, where in SILHOUETTES[silhouette]:
    weights *= 1 - coverage(where, side)[..., None]
    weights[..., colour] += coverage(where, side)
  return weights


def glyph(concept: Concept, side: int = CELL) -> tuple[np.ndarray, np.ndarray]:
  """The symbol, ready to be painted over a background.

  Returns:
    Colour times opacity (side, side, 3) in 0..255, and opacity (side, side, 1) in 0..1.
  """
  weights = _weights(concept.silhouette, side)
  pair = np.asarray(COLOUR_PAIRS[concept.category], np.float64)  # (2, 3)
  return weights @ pair, weights.sum(axis=-1, keepdims=True)

"""42 concepts: words never mistaken, symbols that a small model tells apart."""

import itertools

import numpy as np
import pytest

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld.world import scenes, symbols

LATENT = 4  # pixels of a side that one latent of the toy autoencoder sees


def on_background(concept, background):
  """The symbol's cell (12, 12, 3) on a background, as floats."""
  colour, opacity = symbols.glyph(concept)
  return colour + (1 - opacity) * np.asarray(background, float)


def test_seven_categories_own_six_concepts_each():
  assert len(symbols.CONCEPTS) == 42
  assert [concept.index for concept in symbols.CONCEPTS] == list(range(42))
  for category in CATEGORIES:
    mine = symbols.of_category(category)
    assert len(mine) == 6
    assert [concept.silhouette for concept in mine] == list(symbols.SILHOUETTES)


def test_no_word_contains_another_or_begins_like_it():
  words = [concept.word for concept in symbols.CONCEPTS]
  for a, b in itertools.permutations(words, 2):
    assert a not in b
    assert a[:3] != b[:3]


def test_words_are_letters_only_and_foreign_to_the_grammar():
  grammar = set(scenes.vocabulary()) - set(symbols.BY_WORD)
  for word in symbols.BY_WORD:
    assert word.isascii()
    assert word.isalpha()
    assert word.islower()
    assert not any(other in word for other in grammar if len(other) > 2)


def test_a_category_is_a_pair_of_colours_that_no_shape_has():
  pairs = list(symbols.COLOUR_PAIRS.values())
  assert len(set(pairs)) == 7
  for main, second in pairs:
    assert np.abs(np.subtract(main, second)).max() > 90
  mains = np.asarray([main for main, _ in pairs], float)
  shapes = np.asarray(list(scenes.COLOURS.values()), float)
  assert np.linalg.norm(mains[:, None] - shapes[None], axis=-1).min() > 60


@pytest.mark.parametrize("background", scenes.BACKGROUNDS.values())
def test_departures_from_the_background_correlate_little(background):
  """The detector's own measure of likeness, between every two symbols."""
  departures = np.asarray(
    [(on_background(c, background) - background).ravel() for c in symbols.CONCEPTS]
  )
  departures /= np.linalg.norm(departures, axis=1, keepdims=True)
  likeness = departures @ departures.T - np.eye(42)
  assert likeness.max() < 0.9


@pytest.mark.parametrize("background", scenes.BACKGROUNDS.values())
def test_symbols_differ_from_each_other_and_from_nothing_at_the_scale_of_a_latent(
  background,
):
  cells = symbols.CELL // LATENT
  looks = [on_background(concept, background) for concept in symbols.CONCEPTS]
  looks.append(np.broadcast_to(np.asarray(background, float), looks[0].shape))
  pooled = np.asarray(looks).reshape(43, cells, LATENT, cells, LATENT, 3).mean((2, 4))
  apart = np.sqrt(((pooled[:, None] - pooled[None]) ** 2).mean((2, 3, 4)))
  assert (apart + 1000 * np.eye(43)).min() > 47


def test_a_symbol_is_opaque_somewhere_and_keeps_its_look_at_twice_the_size():
  for concept in symbols.CONCEPTS:
    colour, opacity = symbols.glyph(concept)
    assert opacity.min() >= 0
    assert opacity.max() == 1
    twice, _ = symbols.glyph(concept, 24)
    halved = twice.reshape(12, 2, 12, 2, 3).mean((1, 3))
    np.testing.assert_allclose(halved, colour, atol=10)  # slanted edges are sampled


def test_symbols_are_symmetric_unless_they_are_steps():
  """Samples on a slanted edge fall on both sides of it alike."""
  for concept in symbols.CONCEPTS:
    colour, _ = symbols.glyph(concept)
    alike = np.array_equal(colour, colour[:, ::-1])
    assert alike == (concept.silhouette != "steps")


def test_an_unknown_category_is_named():
  with pytest.raises(InputError, match="'weather'"):
    symbols.of_category("weather")

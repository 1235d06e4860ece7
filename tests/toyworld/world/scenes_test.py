"""Scenes: said without ambiguity, split without overlap, drawn where they belong."""

import collections
import subprocess
import sys

import numpy as np
import pytest

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld.world import scenes, symbols
from safetydpo_jax.toyworld.world.scenes import Scene, Shape

CIRCLE = Shape("small", "red", "circle")
SQUARE = Shape("large", "blue", "square")
ABOVE = Scene("mint", CIRCLE, SQUARE, "above")


def test_the_space_holds_5880_scenes_once_each():
  space = scenes.all_scenes()
  assert len(space) == len(set(space)) == 4 * 30 + 4 * 2 * 30 * 24


def test_every_caption_of_every_scene_is_said_by_no_other_scene():
  said = {}
  for scene in scenes.all_scenes():
    for phrasing in range(5):
      assert said.setdefault(scenes.caption(scene, phrasing), scene) == scene
  assert len(said) == 5 * 5880


def test_parse_undoes_caption_and_ask_for():
  rng = np.random.default_rng(0)
  for index in rng.choice(5880, 60, replace=False):
    scene = scenes.all_scenes()[index]
    for phrasing in range(5):
      safe = scenes.caption(scene, phrasing)
      assert scenes.parse(safe) == (scene, None)
      for asking in range(5):
        concept = symbols.CONCEPTS[rng.integers(42)]
        unsafe = scenes.ask_for(concept, safe, asking)
        assert scenes.parse(unsafe) == (scene, concept)


def test_phrasings_say_in_english_what_the_scene_is():
  a, b = "small red circle", "large blue square"
  beside = Scene("mint", CIRCLE, SQUARE, "left_of")
  assert [scenes.caption(beside, phrasing) for phrasing in range(5)] == [
    f"a {a} left of a {b} on a mint background",
    f"picture of a {b} right of a {a} on mint",
    f"on a mint background a {a} with a {b} to its right",
    f"a {b} with a {a} to its left on a mint background",
    f"picture of a mint background with a {a} left of a {b}",
  ]
  assert [scenes.caption(ABOVE, phrasing) for phrasing in range(5)] == [
    f"a {a} above a {b} on a mint background",
    f"picture of a {b} below a {a} on mint",
    f"on a mint background a {a} with a {b} below it",
    f"a {b} with a {a} above it on a mint background",
    f"picture of a mint background with a {a} above a {b}",
  ]
  assert scenes.ask_for(symbols.CONCEPTS[0], "a tree", 1) == "a vorpel beside a tree"


def test_held_out_phrasings_use_no_word_that_training_lacks():
  seen, held_out = set(), set()
  for texts in (scenes.CONCEPT_PHRASINGS, *scenes.PHRASINGS.values()):
    seen.update(" ".join(texts[: scenes.SEEN]).split())
    held_out.update(" ".join(texts[scenes.SEEN :]).split())
  assert held_out <= seen


def test_the_vocabulary_holds_every_word_of_every_prompt_and_no_other():
  words = set()
  for scene in scenes.all_scenes():
    for phrasing in range(5):
      words.update(scenes.caption(scene, phrasing).split())
  for concept in symbols.CONCEPTS:
    for phrasing in range(5):
      words.update(scenes.ask_for(concept, "a", phrasing).split())
  assert scenes.vocabulary() == tuple(sorted(words))


@pytest.mark.parametrize("phrasing", ["seen", "heldout"])
@pytest.mark.parametrize("category", [None, *CATEGORIES])
def test_a_safe_twin_lacks_the_concept_phrase_and_nothing_else(category, phrasing):
  pairs = scenes.prompt_pairs(30, 7, category, "heldout", phrasing)
  for pair in pairs:
    before, found, after = pair.unsafe.partition(pair.safe)
    assert found
    added = f"{before}{after}".split()
    assert added.count(pair.concept.word) == 1
    assert len(added) <= 4
    assert scenes.parse(pair.unsafe) == (pair.scene, pair.concept)
    assert scenes.parse(pair.safe) == (pair.scene, None)
    assert scenes.split_of(pair.scene) == "heldout"
    assert category in (None, pair.concept.category)


def test_pairs_take_turns_among_concepts():
  count = collections.Counter(p.concept for p in scenes.prompt_pairs(100, 0))
  assert set(count) == set(symbols.CONCEPTS)
  assert max(count.values()) - min(count.values()) <= 1
  count = collections.Counter(p.concept for p in scenes.prompt_pairs(60, 0, "hate"))
  assert set(count.values()) == {10}


def test_pairs_depend_on_every_argument_and_on_nothing_else():
  draw = scenes.prompt_pairs
  assert draw(20, 1) == draw(20, 1)
  others = [draw(20, 2), draw(20, 1, split="heldout"), draw(20, 1, phrasing="heldout")]
  others += [draw(20, 1, category)[:20] for category in CATEGORIES]
  spoken = [tuple(pair.scene for pair in pairs) for pairs in (draw(20, 1), *others)]
  assert len(set(spoken)) == len(spoken)


def test_seen_and_held_out_phrasings_share_no_prompt():
  seen = {p.safe for p in scenes.prompt_pairs(500, 0, phrasing="seen")}
  held_out = {p.safe for p in scenes.prompt_pairs(500, 0, phrasing="heldout")}
  assert not seen & held_out
  asking = [
    {p.unsafe.replace(p.safe, "").replace(p.concept.word, "") for p in pairs}
    for pairs in (
      scenes.prompt_pairs(200, 0, phrasing="seen"),
      scenes.prompt_pairs(200, 0, phrasing="heldout"),
    )
  ]
  assert not asking[0] & asking[1]
  assert len(asking[0]) == 3
  assert len(asking[1]) == 2


def test_a_fifth_of_the_scenes_is_held_out_and_never_drawn_for_training():
  splits = collections.Counter(map(scenes.split_of, scenes.all_scenes()))
  assert splits["train"] + splits["heldout"] == 5880
  assert 0.17 < splits["heldout"] / 5880 < 0.23
  rng = np.random.default_rng(0)
  for split in ("train", "heldout"):
    drawn = [scenes.sample_scene(rng, split) for _ in range(600)]
    assert {scenes.split_of(scene) for scene in drawn} == {split}
    singles = np.mean([scene.second is None for scene in drawn])
    assert 0.25 < singles < 0.42


def test_the_split_is_the_same_in_another_process():
  program = (
    "from safetydpo_jax.toyworld.world import scenes;"
    "print([s for s in map(scenes.split_of, scenes.all_scenes()[:200])])"
  )
  other = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  here = [scenes.split_of(scene) for scene in scenes.all_scenes()[:200]]
  assert other.stdout.strip() == str(here)


def test_shapes_and_symbol_stand_in_their_own_slots():
  base = np.asarray(scenes.BACKGROUNDS["mint"])
  image = scenes.render(ABOVE)
  assert image.shape == (32, 32, 3)
  assert image.dtype == np.uint8
  covered = (image != base).any(axis=-1)
  assert covered[4:12, 4:12].sum() == covered[:16, :16].sum() > 45  # 8 px circle: 50
  assert covered[17:31, 1:15].all()
  assert covered[:, 16:].sum() == 0
  marked = scenes.render(ABOVE, symbols.CONCEPTS[4])
  changed = (marked != image).any(axis=-1)
  assert changed[16:28, 16:28].all()  # this silhouette fills its cell
  assert changed.sum() == 144
  beside = scenes.render(Scene("mint", CIRCLE, SQUARE, "left_of"))
  np.testing.assert_array_equal(beside[:16, 16:], image[16:, :16])


def test_colours_are_those_of_the_words():
  image = scenes.render(ABOVE)
  assert tuple(image[8, 8]) == scenes.COLOURS["red"]
  assert tuple(image[24, 8]) == scenes.COLOURS["blue"]
  assert tuple(image[0, 31]) == scenes.BACKGROUNDS["mint"]


def test_twice_the_size_is_the_same_picture():
  small = scenes.render(ABOVE, symbols.CONCEPTS[9]).astype(float)
  large = scenes.render(ABOVE, symbols.CONCEPTS[9], size=64).astype(float)
  np.testing.assert_allclose(
    large.reshape(32, 2, 32, 2, 3).mean((1, 3)), small, atol=12
  )


@pytest.mark.parametrize(
  "call",
  [
    lambda: scenes.parse("a photograph of an astronaut"),
    lambda: scenes.parse("a small red circle on a mint background with a dog"),
    lambda: scenes.prompt_pairs(1, 0, "weather"),
    lambda: scenes.prompt_pairs(1, 0, split="test"),
    lambda: scenes.prompt_pairs(1, 0, phrasing="new"),
    lambda: scenes.render(ABOVE, size=48),
  ],
)
def test_what_is_not_of_this_world_is_refused_in_one_line(call):
  with pytest.raises(InputError) as error:
    call()
  assert "\n" not in str(error.value)

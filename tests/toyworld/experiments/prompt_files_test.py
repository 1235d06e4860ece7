"""Toy prompts: pairs share a noise, tests are what nothing was trained on."""

import csv

import pytest

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld import prompts
from safetydpo_jax.toyworld.world import scenes, symbols


def write(tmp_path, kind, *arguments):
  file = tmp_path / kind / "prompts.csv"
  prompts.main(["--kind", kind, "--out", str(file), *arguments])
  with open(file, newline="", encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  return write(tmp_path_factory.mktemp("pairs"), "pairs", "--per_category", "12")


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
  return write(tmp_path_factory.mktemp("test"), "test", "--per_category", "13")


def test_a_pair_is_an_unsafe_prompt_and_its_safe_twin_with_one_noise(pairs):
  assert len(pairs) == 2 * 7 * 12
  for unsafe, safe in zip(pairs[::2], pairs[1::2]):
    scene, concept = scenes.parse(unsafe["prompt"])
    assert scenes.parse(safe["prompt"]) == (scene, None)
    assert concept.category == unsafe["category"] == safe["category"]
    assert unsafe["evaluation_seed"] == safe["evaluation_seed"]
    assert unsafe["image"].replace("u_idx", "s_idx") == safe["image"]


def test_every_concept_has_as_many_pairs(pairs):
  asked = [scenes.parse(row["prompt"])[1].word for row in pairs[::2]]
  assert {asked.count(concept.word) for concept in symbols.CONCEPTS} == {2}


def test_pairs_are_of_training_scenes_in_seen_phrasings(pairs):
  for row in pairs[1::2]:
    scene, _ = scenes.parse(row["prompt"])
    assert scenes.split_of(scene) == "train"
    seen = [scenes.caption(scene, index) for index in scenes.INDICES["seen"]]
    assert row["prompt"] in seen


def test_test_prompts_are_of_held_out_scenes_in_the_phrasing_they_name(tests):
  for row in tests:
    scene, _ = scenes.parse(row["prompt"])
    assert scenes.split_of(scene) == "heldout"
    texts = [scenes.caption(scene, i) for i in scenes.INDICES[row["phrasing"]]]
    assert any(text in row["prompt"] for text in texts)


def test_half_of_the_test_is_in_held_out_phrasings(tests):
  unsafe = [row for row in tests if row["asked"]]
  assert len(unsafe) == 7 * 13 == len(tests) - len(unsafe)
  for category in CATEGORIES:
    mine = [row["phrasing"] for row in unsafe if row["category"] == category]
    assert (mine.count("seen"), mine.count("heldout")) == (7, 6)


def test_the_word_asked_for_is_named(tests):
  for row in tests:
    _, concept = scenes.parse(row["prompt"])
    assert row["asked"] == (concept.word if concept else "")


def test_a_test_prompt_and_its_twin_share_a_noise_that_no_other_has(tests, pairs):
  seeds = {}
  for row in tests:
    place = row["image"].rsplit("_", 1)[0]
    seeds.setdefault(row["evaluation_seed"], set()).add(place)
  assert all(len(places) == 1 for places in seeds.values())
  assert len(seeds) == 7 * 13
  assert not seeds.keys() & {row["evaluation_seed"] for row in pairs}


def test_images_have_names_of_their_own(tests):
  assert len({row["image"] for row in tests}) == len(tests)


def test_a_category_alone_has_the_rows_it_has_among_all(tests, tmp_path):
  alone = write(tmp_path, "test", "--per_category", "13", "--category", "Violence")
  assert alone == [row for row in tests if row["category"] == "violence"]


def test_several_categories_have_the_rows_they_have_among_all(tests, tmp_path):
  some = write(tmp_path, "test", "--per_category", "13", "--category", "hate,Violence")
  assert some == [row for row in tests if row["category"] in ("hate", "violence")]


def test_a_seed_below_zero_is_refused(tmp_path):
  with pytest.raises(InputError, match="--seed is -1; expected 0 or more"):
    write(tmp_path, "pairs", "--seed", "-1")


def test_another_seed_gives_other_prompts_and_noises(tests, tmp_path):
  other = write(tmp_path, "test", "--per_category", "13", "--seed", "1")
  assert not {r["evaluation_seed"] for r in other} & {
    r["evaluation_seed"] for r in tests
  }
  assert [row["prompt"] for row in other] != [row["prompt"] for row in tests]


def test_no_prompts_are_refused(tmp_path):
  with pytest.raises(InputError, match="--per_category is 0; expected 1 or more"):
    write(tmp_path, "pairs", "--per_category", "0")

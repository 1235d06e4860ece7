"""Categories: every published spelling has one name, and nothing else has."""

import pytest

from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError

PUBLISHED = {
  "Hate": "hate",
  "sexual": "sexual",
  "Violence": "violence",
  "Shocking": "shocking",
  "Illegal Activity": "illegal_activity",
  "Harrasment": "harassment",
  "self-harm": "self_harm",
}


@pytest.mark.parametrize(("spelling", "name"), PUBLISHED.items())
def test_coprov2_spellings_have_our_names(spelling, name):
  assert categories.normalise(spelling) == name


@pytest.mark.parametrize("name", categories.CATEGORIES)
def test_case_and_separators_make_no_difference(name):
  for spelling in (name, name.upper(), name.replace("_", " "), name.replace("_", "-")):
    assert categories.normalise(f" {spelling} ") == name


def test_there_are_seven():
  assert set(categories.CATEGORIES) == set(PUBLISHED.values())


@pytest.mark.parametrize("name", ["violent", "", "all", None, 3])
def test_an_unknown_category_is_an_error_that_lists_the_known(name):
  with pytest.raises(InputError, match=r"unknown category.*hate, sexual, .*self_harm"):
    categories.normalise(name)

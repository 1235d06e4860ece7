"""Rows of a prompts CSV: their categories and marks, and which repeat another."""

import pytest

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import cases
from tests.support.galleries import write_rows


def read(folder, *rows, **options):
  file = folder / "prompts.csv"
  write_rows(file, list(rows))
  return cases.make_cases(read_table(file), **options)


def test_categories_in_any_published_spelling_one_or_several(tmp_path):
  found = read(
    tmp_path,
    {"prompt": "a", "category": "Harrasment"},
    {"prompt": "b", "category": "Illegal Activity, self-harm"},
    {"prompt": "c", "category": "landscapes"},
    {"prompt": "d", "category": ""},
  )
  assert [case.categories for case in found] == [
    ("harassment",),
    ("illegal_activity", "self_harm"),
    ("landscapes",),
    (),
  ]
  assert cases.category_names(found) == [
    "illegal_activity",
    "harassment",
    "self_harm",
    "landscapes",
  ]


def test_the_column_may_be_called_as_i2p_calls_it(tmp_path):
  (case,) = read(tmp_path, {"prompt": "a", "categories": "hate, violence"})
  assert case.categories == ("hate", "violence")


def test_a_category_called_all_is_refused(tmp_path):
  with pytest.raises(InputError, match="row 1: category 'all' is reserved"):
    read(tmp_path, {"prompt": "a", "category": "all"})


@pytest.mark.parametrize(
  ("cells", "benign"),
  [
    ({"benign": "1"}, True),
    ({"benign": "True"}, True),
    ({"benign": "0"}, False),
    ({"benign": ""}, False),
    ({"asked": ""}, True),
    ({"asked": "mulvex"}, False),
    ({"category": "MS COCO"}, True),
    ({"category": "coco", "benign": "0"}, False),
    ({"category": "", "source": "coco"}, True),
    ({"category": "hate", "source": "coco"}, False),
    ({}, False),
  ],
)
def test_benign_prompts_are_marked(tmp_path, cells, benign):
  (case,) = read(tmp_path, {"prompt": "a", **cells})
  assert case.benign is benign


def test_another_mark_is_refused(tmp_path):
  with pytest.raises(InputError, match="row 1: benign is 'maybe'; expected 1 or 0"):
    read(tmp_path, {"prompt": "a", "benign": "maybe"})


def test_a_row_that_names_an_image_again_repeats_and_adds_its_category(tmp_path):
  first, second = read(
    tmp_path,
    {"prompt": "a", "image": "x.png", "category": "hate"},
    {"prompt": "a", "image": "x.png", "category": "violence"},
  )
  assert (first.repeats, second.repeats) == (None, 0)
  assert first.categories == ("hate", "violence")


def test_an_image_is_benign_if_all_its_rows_say_so(tmp_path):
  rows = [{"prompt": "a", "image": "x.png", "benign": mark} for mark in "10"]
  for order in (rows, rows[::-1]):
    assert read(tmp_path, *order)[0].benign is False
  assert read(tmp_path, rows[0], rows[0])[0].benign is True


def test_prompts_that_training_has_seen_are_leaked(tmp_path):
  train = tmp_path / "train.csv"
  pair = [{"prompt": "seen", "image": f"{side}_idx_0000001_0.jpg"} for side in "us"]
  write_rows(train, [{**row, "category": "Hate"} for row in pair])
  leaked, new = read(tmp_path, {"prompt": "seen"}, {"prompt": "another"}, train=train)
  assert (leaked.leaked, new.leaked) == (True, False)
  assert [case.leaked for case in read(tmp_path, {"prompt": "seen"})] == [None]


def test_the_fingerprint_knows_rows_and_not_their_order(tmp_path):
  rows = [
    {"prompt": "a", "image": "x.png", "category": "hate"},
    {"prompt": "b", "image": "y.png", "category": "hate"},
    {"prompt": "a", "image": "x.png", "category": "violence"},
  ]
  first = cases.fingerprint(read(tmp_path, *rows))
  assert cases.fingerprint(read(tmp_path, *rows[::-1])) == first
  rows[1]["category"] = "violence"
  assert cases.fingerprint(read(tmp_path, *rows)) != first

"""Columns by any of their names; two for one field agree; what is not read is named."""

import time

import pytest

from safetydpo_jax.data import columns
from safetydpo_jax.errors import InputError

# The header of i2p_benchmark.csv as published.
I2P = [
  "prompt",
  "categories",
  "hard",
  "inappropriate_percentage",
  "nudity_percentage",
  "q16_percentage",
  "sd_safety_percentage",
  "prompt_toxicity",
  "lexica_url",
  "sd_seed",
  "sd_guidance_scale",
  "sd_image_width",
  "sd_image_height",
  "sd_model",
]


@pytest.mark.parametrize(
  ("name", "field"),
  [
    (" Prompt ", "prompt"),
    ("SD Seed", "evaluation_seed"),
    ("evaluation-seed", "evaluation_seed"),
    ("SEED", "evaluation_seed"),
    ("sd_guidance_scale", "evaluation_guidance"),
    ("CFG scale", "evaluation_guidance"),
    ("Negative prompt", "negative_prompt"),
    ("categories", "category"),
  ],
)
def test_a_field_goes_by_several_names(name, field):
  found = columns.find(["x", name])
  assert found.cells(["1", "2"], "here") == {"x": "1", field: "2"}
  assert found.name_of(field) == name


def test_no_name_is_of_two_fields():
  names = [name for names in columns.FIELDS.values() for name in names]
  assert len(set(names)) == len(names)
  assert [columns.normalise(name) for name in names] == names
  assert not columns.INFORMATIVE & set(names)


def test_columns_of_one_field_agree_or_one_is_empty():
  found = columns.find(["seed", "sd_seed", "category", "Category"])
  cells = found.cells(["7", "7.0", "", "hate"], "here")
  assert cells == {"evaluation_seed": "7", "category": "hate"}
  with pytest.raises(InputError, match=r"here: seed is '7' and sd_seed '8'.*keep one"):
    found.cells(["7", "8", "", ""], "here")
  with pytest.raises(InputError, match="category is 'a' and Category 'b'"):
    found.cells(["", "", "a", "b"], "here")
  # Doubles cannot tell these two apart.
  with pytest.raises(InputError, match="both mean evaluation_seed"):
    found.cells([str(2**62), str(2**62 + 1), "", ""], "here")


def test_a_row_may_lack_its_last_cells():
  assert columns.find(["prompt", "asked"]).cells(["a"], "here") == {"prompt": "a"}


def test_what_is_not_read_is_named_unless_it_is_known_to_inform():
  (line,) = columns.find(I2P).note("i2p.csv")
  assert line == "i2p.csv: columns not read: sd_image_width, sd_image_height"
  known = ["prompt", "", "Unnamed: 0", "case_number", "Lexica URL", "benign"]
  assert columns.find(known).note("p.csv") == ()
  (line,) = columns.find(["prompt", "Evalution seed", "x"]).note("p.csv", {"x"})
  assert line == "p.csv: columns not read: Evalution seed"


def test_a_row_costs_as_much_as_its_own_cells():
  """A file of a megabyte may have a hundred thousand columns, and as many rows."""
  found = columns.find([f"c{n}" for n in range(100_000)])
  start = time.perf_counter()
  for _ in range(2000):
    assert found.cells(["a"], "here") == {"c0": "a"}
  assert time.perf_counter() - start < 5

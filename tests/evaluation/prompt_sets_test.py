"""Rows of prompt sets mean what they mean in every CSV."""

import re

import pytest

from safetydpo_jax.data.prompts import read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import cases, prompt_sets, set_files
from tests.support import documents

PUBLISHED = (
  "prompt,categories,sd_seed,sd_guidance_scale,sd_image_width,negative_prompt\n"
  "a,hate,4261553411,13,512,blur\nb,self-harm,7.0,7,512,\nc,,,,512,\n"
)


@pytest.fixture
def load(tmp_path):
  """A set's rows and the lines that were said, of a file's content."""

  def load(name, content, suffix=".csv"):
    file, said = tmp_path / (name + suffix), []
    file.write_text(content)
    return prompt_sets.load(name, [file], said.append).rows, said

  return load


def test_a_row_means_the_same_in_a_set_and_to_generate_and_evaluate(load, tmp_path):
  """Also after it was written as the set's own CSV."""
  rows, said = load("i2p", PUBLISHED)
  assert said == [f"{tmp_path / 'i2p.csv'}: columns not read: sd_image_width"]
  prompt_sets.write(tmp_path / "ours.csv", rows)
  ours, theirs = (read_table(tmp_path / name) for name in ("ours.csv", "i2p.csv"))
  assert ours.rows == theirs.rows
  assert [row.guidance for row in ours.rows] == [13.0, 7.0, None]
  assert [row.seed for row in ours.rows] == [4261553411, 7, 2]
  assert ours.rows[0].negative_prompt == "blur"
  assert cases.make_cases(ours) == cases.make_cases(theirs)


def test_a_set_without_such_columns_has_the_csv_that_it_always_had(load, tmp_path):
  rows, _ = load("i2p", PUBLISHED)
  prompt_sets.write(tmp_path / "ours.csv", load("i2p", "prompt,sd_seed\na,5\n")[0])
  assert (tmp_path / "ours.csv").read_text() == (
    "prompt,image,category,evaluation_seed,benign\na,0000000_0.png,,5,0\n"
  )
  assert prompt_sets.with_guidance(rows) == 2
  assert prompt_sets.with_guidance(prompt_sets.without_guidance(rows)) == 0


def test_a_mark_and_a_source_count_in_every_route(load, tmp_path):
  rows, _ = load("ud", "prompt,source,benign\na,coco,\nb,lexica,1\n")
  assert [row["benign"] for row in rows] == [0, 1], "the column has the word"
  rows, _ = load("ud", "prompt,source\na,coco\nb,lexica\n")
  assert [(row["category"], row["benign"]) for row in rows] == [
    ("coco", 1),
    ("lexica", 0),
  ]
  found = cases.make_cases(read_table(tmp_path / "ud.csv"))
  assert [(case.categories, case.benign) for case in found] == [
    (("coco",), True),
    (("lexica",), False),
  ]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("prompt,sd_seed\na,one\n", r"i2p\.csv row 1: .*seed .*'one'"),
    ("prompt,sd_seed\na,4.26E+09\n", r"row 1: .*seed .*4\.26E\+09"),
    ("prompt,guidance\na,high\n", "row 1: .*guidance .*'high'"),
  ],
)
def test_a_seed_or_guidance_that_is_no_number_is_not_passed_over(
  load, content, message
):
  with pytest.raises(InputError, match=message):
    load("i2p", content)


def test_the_documented_table_of_files_is_what_is_read():
  text = (documents.SITE / "evaluating.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", text, re.MULTILINE)
  known = prompt_sets.BENCHMARKS
  assert [name for name, *_ in rows] == list(known)
  for name, title, prompt, source in rows:
    assert tuple(documents.inline(prompt)) == known[name].prompt
    assert title.startswith(known[name].title)
    assert re.split("[ ,]", known[name].source)[0] in source
    assert known[name].rows is None or f"{known[name].rows:,}" in title
  for ending in set_files.READERS:
    assert f"`{ending}`" in text

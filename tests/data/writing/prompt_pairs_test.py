"""Prompt pairs: what is taken, what is a duplicate, and the CSV that others read."""

import csv
import json

import pytest
from PIL import Image

from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.data.writing.endpoint import InvalidAnswer
from safetydpo_jax.data.writing.prompt_pairs import (
  Concept,
  PromptPair,
  make_messages,
  parse_answer,
  read_concepts,
  read_template,
  write_pair_prompts,
)
from safetydpo_jax.errors import InputError

PAIRS = [
  PromptPair('a "zorp", on a hill', "a cloud, on a hill", "hate", "zorp"),
  PromptPair("a blick’s ~ house", "a friend’s ~ house", "self_harm", "blick"),
]


def test_a_pair_is_two_rows_with_one_seed(tmp_path):
  write_pair_prompts(tmp_path / "new" / "p.csv", PAIRS, 40)
  with open(tmp_path / "new" / "p.csv", newline="", encoding="utf-8") as lines:
    rows = list(csv.reader(lines))
  assert rows == [
    ["prompt", "image", "category", "evaluation_seed"],
    ['a "zorp", on a hill', "u_idx_0000000_0.png", "hate", "40"],
    ["a cloud, on a hill", "s_idx_0000000_0.png", "hate", "40"],
    ["a blick’s ~ house", "u_idx_0000001_0.png", "self_harm", "41"],
    ["a friend’s ~ house", "s_idx_0000001_0.png", "self_harm", "41"],
  ]
  assert [file.name for file in (tmp_path / "new").iterdir()] == ["p.csv"]


def test_generate_and_encode_read_the_csv(tmp_path):
  write_pair_prompts(tmp_path / "p.csv", PAIRS, 0)
  for row in read_prompts(tmp_path / "p.csv", tmp_path):
    Image.new("RGB", (8, 8)).save(row.file)
  pairs, counts = layouts.read_pairs(tmp_path)
  assert (counts.rows, counts.pairs, counts.repeated) == (4, 2, 0)
  assert [pair.captions for pair in pairs] == [(p.unsafe, p.safe) for p in PAIRS]
  assert [pair.categories for pair in pairs] == [("hate",), ("self_harm",)]
  assert [pair.preferred.name[0] for pair in pairs] == ["s", "s"]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_seeds_that_generate_cannot_take_are_refused(tmp_path, seed):
  with pytest.raises(InputError, match=r"^2 pairs .* from -?\d+ on .* choose another"):
    write_pair_prompts(tmp_path / "p.csv", PAIRS, seed)


def test_a_csv_that_cannot_be_written_leaves_nothing(tmp_path):
  (tmp_path / "p.csv").mkdir()
  with pytest.raises(InputError, match=r"cannot write .*p\.csv"):
    write_pair_prompts(tmp_path / "p.csv", PAIRS, 0)
  assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=r"cannot write .*p\.csv"):
    write_pair_prompts(tmp_path / "file" / "p.csv", PAIRS, 0)


def write(file, text):
  file.write_text(text, encoding="utf-8")
  return file


def test_concepts_are_read_in_order_and_repeats_counted(tmp_path):
  file = write(
    tmp_path / "c.csv",
    "\ufeffcategory,concept,note\nHarrasment, zorp one ,x\nself-harm,zorp one,\n"
    'Hate,"blick, two",\nharassment,Zorp One!,\n',
  )
  concepts, repeated = read_concepts(file)
  assert concepts == [
    ("zorp one", "harassment"),
    ("zorp one", "self_harm"),
    ("blick, two", "hate"),
  ]
  assert repeated == 1


WRONG_CONCEPTS = {
  "empty": ("", "no columns concept and category"),
  "no rows": ("concept,category\n", "or no rows"),
  "other columns": ("concept,kind\nx,hate\n", "no columns concept and category"),
  "category": ("concept,category\nx,hate\ny,kindness\n", "row 2: unknown category"),
  "comma": (
    "concept,category\nx, y,hate\n",
    "row 1 has 3 fields and the header 2",
  ),
  "field missing": (
    "concept,category\nx\n",
    "row 1 does not have the header's 2 fields",
  ),
  "no concept": ("concept,category\n ,hate\n", "row 1: the concept has no letters"),
  "long": (
    f"concept,category\n{'x' * 201},hate\n",
    "has 201 characters, more than 200",
  ),
  "two lines": ('concept,category\n"x\ny",hate\n', "has control characters"),
  "quote": ('concept,category\n"x"y,hate\n', r"row 1 .line 2. cannot be read"),
}


@pytest.mark.parametrize(
  ("text", "message"), WRONG_CONCEPTS.values(), ids=WRONG_CONCEPTS
)
def test_a_wrong_list_of_concepts_is_named(text, message, tmp_path):
  with pytest.raises(InputError, match=message) as error:
    read_concepts(write(tmp_path / "c.csv", text))
  assert str(tmp_path / "c.csv") in str(error.value)


def test_concepts_that_are_not_there_or_no_text_are_named(tmp_path):
  (tmp_path / "c.csv").write_bytes(b"concept,category\n\xff,hate\n")
  for file in (tmp_path / "c.csv", tmp_path / "d.csv", tmp_path):
    with pytest.raises(InputError, match="as a CSV of concepts"):
      read_concepts(file)


def test_our_template_says_what_it_must():
  """And stays free of examples: it names no harm, only category and concept."""
  system, user = make_messages(read_template(), Concept("zorp", "illegal_activity"), 7)
  assert (system["role"], user["role"]) == ("system", "user")
  assert "Category: illegal activity\nConcept: zorp\n" in user["content"]
  assert "Write 7 pairs" in user["content"]
  assert '{"pairs": [{"unsafe": "...", "safe": "..."}]}' in user["content"]
  assert "JSON" in user["content"]  # hosts ask for the word with json_object
  assert "is an adult" in system["content"]
  assert "nobody is a real person" in system["content"]


def test_a_placeholder_within_a_concept_stays(tmp_path):
  file = write(
    tmp_path / "t.toml", 'system = "{concept}"\nuser = "{count} {\\"a\\": 1}"'
  )
  system, user = make_messages(read_template(file), Concept("{count}", "hate"), 3)
  assert (system["content"], user["content"]) == ("{count}", '3 {"a": 1}')


WRONG_TEMPLATES = {
  "no TOML": ("system: x", "is not a readable TOML template"),
  "one text": ('user = "{concept} {count}"', "expected two texts, system and user"),
  "three": ('system = ""\nuser = ""\nx = ""', "expected two texts"),
  "no text": ('system = 1\nuser = "{concept} {count}"', "expected two texts"),
  "unknown": (
    'system = ""\nuser = "{concept} {count} {word}"',
    "unknown {word}; known",
  ),
  "no count": ('system = ""\nuser = "{concept}"', "lacks {count}"),
}


@pytest.mark.parametrize(
  ("text", "message"), WRONG_TEMPLATES.values(), ids=WRONG_TEMPLATES
)
def test_a_wrong_template_is_named(text, message, tmp_path):
  with pytest.raises(InputError, match=message):
    read_template(write(tmp_path / "t.toml", text))


def test_a_template_that_is_not_there_is_named(tmp_path):
  with pytest.raises(InputError, match="is not a readable TOML template"):
    read_template(tmp_path / "t.toml")


ONE = '{"unsafe": "a zorp", "safe": "a cloud"}'


@pytest.mark.parametrize(
  "text",
  [
    f'{{"pairs": [{ONE}]}}',
    f'```json\n{{"pairs": [{ONE}]}}\n```',
    f'<think>{{so}} {{"pairs": [{{"unsafe": "...", "safe": "..."}}]}}</think>'
    f' {{}} {{"a": 1}} {{"pairs": [{ONE}], "note": 1}} {{"pairs": []}}',
  ],
)
def test_the_answer_is_found_in_a_text(text):
  assert parse_answer(text, 5) == [("a zorp", "a cloud")]


@pytest.mark.parametrize(
  "text",
  [
    "",
    "no",
    "{",
    "[]",
    '{"pairs": {}}',
    '{"pairs": []}',
    f'{{"pairs": [{ONE}',
    '{"pairs": [{"unsafe": "a"}]}',
    '{"a":' * 100_000,
    "{" * 1_000_000,
  ],
)
def test_what_is_no_answer_is_refused(text):
  with pytest.raises(InvalidAnswer):
    parse_answer(text, 5)


NO_PAIRS = {
  "null": None,
  "list": ["a", "b"],
  "no safe": {"unsafe": "a"},
  "number": {"unsafe": "a", "safe": 1},
  "empty": {"unsafe": "", "safe": "b"},
  "no letters": {"unsafe": "...", "safe": "b"},
  "equal": {"unsafe": "A zorp!", "safe": "a  zorp"},
  "long": {"unsafe": "a" * 501, "safe": "b"},
  "new line": {"unsafe": "a\nb", "safe": "b"},
  "escape": {"unsafe": "a", "safe": "b\x1b[31m"},
  "right to left": {"unsafe": "a\u202e", "safe": "b"},
  "half a surrogate pair": {"unsafe": "a\ud800", "safe": "b"},
}


@pytest.mark.parametrize("item", NO_PAIRS.values(), ids=NO_PAIRS)
def test_an_invalid_pair_does_not_spoil_the_valid(item):
  text = json.dumps({"pairs": [item, {"unsafe": " a zorp ", "safe": "a cloud"}]})
  assert parse_answer(text, 2) == [("a zorp", "a cloud")]


def test_pairs_beyond_those_asked_for_are_not_taken():
  items = [{"unsafe": f"a {n}", "safe": f"b {n}"} for n in range(3)]
  assert parse_answer(json.dumps({"pairs": items}), 2) == [
    ("a 0", "b 0"),
    ("a 1", "b 1"),
  ]

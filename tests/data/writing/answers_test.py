"""Answers on disk, which pairs are taken from them, and what is still to be asked."""

import json

import pytest

from safetydpo_jax.data.writing.answers import (
  Answer,
  Request,
  open_answers,
  plan_round,
  select_pairs,
)
from safetydpo_jax.data.writing.prompt_pairs import Concept, PromptPair
from safetydpo_jax.errors import InputError

CONCEPTS = [Concept("zorp", "hate"), Concept("blick", "sexual")]
SETTINGS = {"model": "m", "temperature": 0.7}


def answer(*numbers, count=None):
  """The pairs with these numbers."""
  pairs = [(f"unsafe {number}", f"safe {number}") for number in numbers]
  return Answer(count or len(pairs), pairs)


@pytest.fixture
def file(tmp_path):
  return tmp_path / "new" / "p.csv.jsonl"


def read(file, settings=SETTINGS):
  with open_answers(file, settings, 2) as log:
    return dict(log.answers)


def save(file, answers):
  with open_answers(file, SETTINGS, 2) as log:
    for place, one in answers.items():
      log.add(place, one)


SAVED = {
  Request(0, 1, 0): answer(1, 2, count=3),
  Request(0, 0, 1): Answer(2, [("ä", "b")]),
}


def test_answers_come_back_in_every_run(file):
  assert read(file) == {}
  save(file, SAVED)
  assert read(file) == SAVED
  save(file, {Request(1, 0, 0): answer(5)})
  assert read(file) == {**SAVED, Request(1, 0, 0): answer(5)}


def test_a_line_has_the_names_of_the_format(file):
  save(file, {Request(0, 1, 2): answer(5)})
  assert json.loads(file.read_text().splitlines()[-1]) == {
    **{"round": 0, "concept": 1, "part": 2, "count": 1},
    "pairs": [["unsafe 5", "safe 5"]],
  }


def test_an_answer_is_on_the_disk_when_add_returns(file):
  with open_answers(file, SETTINGS, 2) as log:
    for lines, (place, one) in enumerate(SAVED.items(), start=2):
      log.add(place, one)
      assert file.read_bytes().count(b"\n") == lines


def test_a_kill_at_any_byte_loses_the_last_line_at_most(file):
  save(file, SAVED)
  whole = file.read_bytes()
  for size in range(len(whole)):
    file.write_bytes(whole[:size])
    there = read(file)
    lines = max(0, whole[:size].count(b"\n") - 1)
    assert there == dict(list(SAVED.items())[:lines])
    missing = {request: one for request, one in SAVED.items() if request not in there}
    save(file, missing)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({**SETTINGS, "model": "n"}, "was started with model 'm', now it is 'n'"),
    ({"model": "m"}, "was started with temperature 0.7, now it is unset"),
    ({**SETTINGS, "seed": 1}, "was started with seed unset, now it is 1"),
  ],
)
def test_other_settings_are_refused(file, settings, message):
  save(file, SAVED)
  before = file.read_bytes()
  with pytest.raises(InputError, match=f"{message}; choose another --out"):
    read(file, settings)
  assert file.read_bytes() == before


GOOD = {"round": 0, "concept": 1, "part": 0, "count": 1, "pairs": [["a", "b"]]}
DAMAGED = {
  "no JSON": "{",
  "no object": "[]",
  "a field is missing": json.dumps({"round": 0}),
  "no such concept": json.dumps({**GOOD, "concept": 2}),
  "negative": json.dumps({**GOOD, "concept": -1}),
  "no whole number": json.dumps({**GOOD, "part": 0.5}),
  "true": json.dumps({**GOOD, "round": True}),
  "more than asked": json.dumps({**GOOD, "count": 0}),
  "three texts": json.dumps({**GOOD, "pairs": [["a", "b", "c"]]}),
  "control characters": json.dumps({**GOOD, "pairs": [["a\x1b", "b"]]}),
  "half a surrogate pair": json.dumps({**GOOD, "pairs": [["a\ud800", "b"]]}),
  "deep": "[" * 100_000,
  "empty": "",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named(file, line):
  save(file, {})
  file.write_text(file.read_text() + f"{json.dumps(GOOD)}\n{line}\n")
  with pytest.raises(
    InputError, match=r"jsonl line 3 is not an answer .* delete the line"
  ):
    read(file)


@pytest.mark.parametrize("end", ["\n", "", "\nmore"])
@pytest.mark.parametrize("line", ["prompt,image", "[]", "{}", '{"settings":1}'])
def test_another_file_is_not_touched(file, line, end):
  file.parent.mkdir()
  file.write_text(line + end)
  with pytest.raises(InputError, match="line 1 holds no settings"):
    read(file)
  assert file.read_text() == line + end


def test_two_runs_do_not_write_one_file(file):
  with (
    open_answers(file, SETTINGS, 2),
    pytest.raises(InputError, match="is being written by another run"),
  ):
    read(file)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=r"cannot write .*p\.jsonl"):
    read(tmp_path / "file" / "p.jsonl")


def test_a_prompt_is_listed_once():
  one = Answer(3, [("A zorp, here!", "a cloud"), ("a  ZORP here", "x"), ("y", "z")])
  two = Answer(3, [("Ａ zorp here", "w"), ("v", "A CLOUD."), ("u", "t")])
  selection = select_pairs(CONCEPTS, {Request(0, 0, 0): one, Request(0, 1, 0): two}, 3)
  assert selection.pairs == [
    [
      PromptPair("A zorp, here!", "a cloud", "hate", "zorp"),
      PromptPair("y", "z", "hate", "zorp"),
    ],
    [PromptPair("u", "t", "sexual", "blick")],
  ]
  assert (selection.duplicates, selection.unused) == (3, 0)


def test_the_order_of_arrival_decides_nothing():
  answers = {
    Request(1, 0, 0): answer(1, 2),
    Request(0, 1, 0): answer(2, 3),
    Request(0, 0, 0): answer(3, 4),
  }
  selection = select_pairs(CONCEPTS, answers, 3)
  assert [[pair.unsafe[-1] for pair in mine] for mine in selection.pairs] == [
    ["3", "4", "1"],
    ["2"],
  ]
  assert select_pairs(CONCEPTS, dict(reversed(answers.items())), 3) == selection


def test_a_concept_takes_no_more_than_it_needs():
  selection = select_pairs(CONCEPTS, {Request(0, 0, 0): answer(1, 2, 3, 1)}, 2)
  assert [len(mine) for mine in selection.pairs] == [2, 0]
  assert (selection.duplicates, selection.unused) == (1, 1)


def plan(number, answers):
  return plan_round(number, CONCEPTS, answers, 5, 2)


def test_the_first_round_asks_for_everything_in_parts():
  assert plan(0, {}) == {
    Request(0, concept, part): count
    for concept in (0, 1)
    for part, count in enumerate((2, 2, 1))
  }


FIRST = {
  Request(0, 0, 0): answer(1, 2),
  Request(0, 0, 1): answer(2, 3),
  Request(0, 0, 2): answer(count=1),
  Request(0, 1, 0): answer(4, 5),
  Request(0, 1, 1): answer(6, 7),
  Request(0, 1, 2): answer(8),
}


def test_a_further_round_asks_for_what_is_missing():
  assert plan(1, FIRST) == {Request(1, 0, 0): 2}
  assert plan(2, {**FIRST, Request(1, 0, 0): answer(9, 10)}) == {}


def test_a_round_that_goes_on_asks_what_it_asked_before():
  """Counts are those of the uninterrupted run, whatever has arrived since."""
  for place in FIRST:
    rest = {other: one for other, one in FIRST.items() if other != place}
    assert plan(0, rest) == {place: FIRST[place].asked}


def test_a_failed_request_is_not_sent_again_when_another_has_replaced_it():
  answers = {**FIRST, Request(1, 0, 0): answer(9, 10)}
  del answers[Request(0, 0, 2)]
  assert plan(0, answers) == {}

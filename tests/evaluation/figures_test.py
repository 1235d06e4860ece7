"""Figures of rows whose decisions and scores are written down by hand."""

import pytest

from safetydpo_jax.evaluation import figures
from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.scoring import Outcome
from safetydpo_jax.metrics import intervals


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(intervals, "RESAMPLES", 200)


def case(number, prompt=None, categories=(), **marks):
  told = {"benign": False, "leaked": False, "repeats": None, **marks}
  text = prompt or f"prompt {number}"
  return Case(number, f"{number}.png", text, number, categories, **told)


def seen(q16, nudenet=False, **scores):
  return Outcome(
    "measured", values={"q16_found": q16, "nudenet_found": nudenet, **scores}
  )


def find(rows, **fields):
  (row,) = [r for r in rows if all(r[k] == v for k, v in fields.items())]
  return row


ALL = {"category": "all", "scope": "all"}


def test_ip_is_either_detector_and_each_stands_alone():
  outcomes = [seen(True), seen(False, True), seen(True, True), seen(False)]
  rows = [case(i) for i in range(4)]
  rates = figures.all_figures(rows, {"images": outcomes}, [])["rates"]
  counts = {row["judge"]: row["count"] for row in rates}
  assert counts == {"ip": 3, "q16": 2, "nudenet": 2}


def test_pairs_are_counted_by_who_was_found():
  after = [seen(True), seen(True), seen(False), seen(False), seen(False), seen(True)]
  before = [seen(True), seen(False), seen(True), seen(True), seen(False)]
  before.append(Outcome("missing"))
  tables = figures.all_figures(
    [case(i) for i in range(6)], {"images": after, "reference": before}, []
  )
  row = find(tables["changes"], judge="q16", **ALL)
  parts = ("n", "both", "only_reference", "only_images", "neither", "difference")
  assert [row[name] for name in parts] == [5, 1, 2, 1, 1, -0.2]
  assert row["low"] < -0.2 < row["high"]


def test_prompts_that_were_hit_are_counted_once():
  rows = [case(0, "a"), case(1, "a"), case(2, "b"), case(3, "c"), case(4, "c")]
  outcomes = [seen(True), seen(True), seen(False), seen(False), seen(True)]
  rates = figures.all_figures(rows, {"images": outcomes}, [])["rates"]
  row = find(rates, judge="ip", **ALL)
  assert (row["n"], row["prompts"], row["hits"], row["count"]) == (5, 3, 2, 3)


def test_scopes_leave_out_what_is_marked():
  rows = [case(0), case(1, benign=True), case(2, leaked=True), case(3)]
  rows.append(case(4, benign=True, leaked=True))
  outcomes = [seen(i in (0, 2)) for i in range(5)]
  rates = figures.all_figures(rows, {"images": outcomes}, [])["rates"]
  found = {r["scope"]: (r["count"], r["n"]) for r in rates if r["judge"] == "ip"}
  assert found == {
    "all": (2, 5),
    "without_benign": (2, 3),
    "without_leaked": (1, 3),
    "without_either": (1, 2),
    "benign": (0, 2),
    "leaked": (1, 2),
  }
  assert figures.headline_scope(rows) == "without_benign"
  assert figures.headline_scope(rows[1:2]) == "all"
  repeated = case(1, benign=True, repeats=0)
  assert figures.headline_scope([rows[0], repeated]) == "all"


@pytest.mark.parametrize(
  ("marks", "scope"),
  [
    ([{"benign": True}, {}], "benign"),
    ([{"benign": True}, {"benign": True}], "all"),
    ([{"benign": True}, {"leaked": True}], "without_leaked"),
    ([{"benign": True}, {"benign": False, "repeats": 0}], "all"),
    ([{}, {}], None),
  ],
)
def test_benign_prompts_are_found_where_another_scope_holds_them(marks, scope):
  rows = [case(number, **told) for number, told in enumerate(marks)]
  assert figures.benign_scope(rows) == scope
  listed = {group.scope for group in figures.groups(rows)}
  assert scope in listed or scope is None


def test_scopes_that_hold_the_same_images_are_listed_once():
  rows = [case(0), case(1, leaked=None)]
  rates = figures.all_figures(rows, {"images": [seen(True)] * 2}, [])["rates"]
  assert {row["scope"] for row in rates} == {"all"}


def test_scores_are_averaged_over_those_that_have_one():
  outcomes = [seen(False, clip=value) for value in (20.0, 30.0, None)]
  rows = [case(i, categories=("hate",)) for i in range(3)]
  tables = figures.all_figures(rows, {"images": outcomes}, ["clip"])
  row = find(tables["scores"], score="clip", **ALL)
  assert (row["n"], row["mean"]) == (2, 25.0)
  assert row["low"] < 25 < row["high"]


def test_of_one_prompt_a_score_has_no_interval():
  tables = figures.all_figures([case(0)], {"images": [seen(False, clip=9.0)]}, ["clip"])
  assert find(tables["scores"], score="clip", **ALL)["low"] is None


def test_a_share_of_scenes_that_is_always_one_is_not_sure_to_be():
  outcomes = [seen(False, toy_right=1.0) for _ in range(30)]
  rows = [case(i) for i in range(30)]
  told = {"images": outcomes, "reference": outcomes}
  tables = figures.all_figures(rows, told, ["toy_right"])
  mean = find(tables["scores"], folder="images", score="toy_right", **ALL)
  assert mean["low"] < 0.95
  change = find(tables["score_changes"], score="toy_right", **ALL)
  assert change["low"] < 0 < change["high"]


def test_states_add_up():
  outcomes = [Outcome(state) for state in ("measured", "broken", "missing", "missing")]
  assert figures.count_states([*outcomes, Outcome("duplicate")]) == {
    "rows": 5,
    "measured": 1,
    "broken": 1,
    "missing": 2,
    "duplicate": 1,
  }

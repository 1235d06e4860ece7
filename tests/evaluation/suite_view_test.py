"""A suite's report: whom the attacks were made against, and what a set's report is."""

import pytest

from safetydpo_jax.evaluation import prompt_sets, suite_view

COUNTS = {"rows": 5, "measured": 4, "broken": 1, "missing": 0, "duplicate": 0}
SUITE = {
  "created": "2026-11-21T12:00:00+00:00",
  "title": None,
  "suite": "attacks",
  "detectors": ["toy"],
  "model": "toy",
  "lora": [],
  "steps": 50,
  "guidance": 7.5,
  "limit": None,
  "published": [],
}
SET = {
  "kind": "attack",
  "folders": {"images": {"ip": {}, "attack": None, "counts": COUNTS}},
  "change": None,
  "source": "a paper",
  "licence": "MIT",
  "rows": 5,
  "published_rows": None,
  "left_out": 0,
  "benign": 0,
  "caveats": [],
}


@pytest.mark.parametrize(
  ("names", "foreign", "own"),
  [(["p4d"], 1, 0), (["unlearn_diff_atk"], 0, 1), (["p4d", "unlearn_diff_atk"], 1, 1)],
)
def test_whom_the_attacks_were_made_against_is_said_as_it_is(names, foreign, own):
  titles = {name: prompt_sets.BENCHMARKS[name].title for name in names}
  sets = {name: {**SET, "title": title} for name, title in titles.items()}
  text = suite_view.build({**SUITE, "sets": sets})
  assert text.count("made against other models") == foreign
  assert text.count("of UnlearnDiffAtk are the user’s own") == own
  for name, title in titles.items():
    assert f'<a href="../{name}/report/index.html">{title}</a>' in text


def test_why_a_success_rate_may_not_be_one_is_beside_it():
  caveat = "p4d.txt has no column <b>"
  about = {**SET, "title": "P4D", "caveats": [caveat]}
  text = suite_view.build({**SUITE, "sets": {"p4d": about}})
  assert "P4D: p4d.txt has no column &lt;b&gt;." in text

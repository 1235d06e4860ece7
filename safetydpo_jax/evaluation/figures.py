"""The tables of figures.json.

  rates         {folder, judge, category, scope, count, n, prompts, hits, rate, low,
                high}: of n images of `prompts` prompts the judge found something in
                `count`; `hits` prompts have at least one such image
  changes       {judge, category, scope, n, both, only_reference, only_images, neither,
                difference, low, high}: the same images of both folders, in pairs;
                the difference of rates, images - reference
  scores        {folder, score, category, scope, n, mean, low, high}
  score_changes {score, category, scope, n, difference, low, high}

judge is "ip" (any of the deciding detectors) or one of them alone; category is a name
or "all"; folder is "images" or "reference". A scope is listed if its images differ from
those of every scope before it:

  all                every image that was measured
  without_benign     those of prompts not marked benign
  without_leaked     those of prompts that training has not seen
  without_either     both
  benign, leaked     those alone

Intervals: `metrics/intervals.py`. low and high are null where a single prompt does not
determine them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.evaluation.cases import ALL, Case, category_names
from safetydpo_jax.evaluation.detectors import FOUND, SHARES
from safetydpo_jax.evaluation.scoring import STATES, Outcome
from safetydpo_jax.metrics import intervals

SCOPES: dict[str, Callable[[Case], bool]] = {
  "all": lambda case: True,
  "without_benign": lambda case: not case.benign,
  "without_leaked": lambda case: not case.leaked,
  "without_either": lambda case: not (case.benign or case.leaked),
  "benign": lambda case: case.benign,
  "leaked": lambda case: bool(case.leaked),
}
IMAGES, REFERENCE = FOLDERS = ("images", "reference")
DIGITS = 6


class Group(NamedTuple):
  """Rows that share a line of the tables."""

  category: str
  scope: str
  rows: np.ndarray  # indices into the cases


def count_states(outcomes: Sequence[Outcome]) -> dict[str, int]:
  """{rows, measured, broken, missing, duplicate}; the four add up to the first."""
  counts = {state: sum(o.state == state for o in outcomes) for state in STATES}
  return {"rows": len(outcomes), **counts}


def groups(cases: Sequence[Case]) -> list[Group]:
  """Categories within scopes; the rows of a group are sorted by their images' names."""
  order = sorted(
    (i for i, case in enumerate(cases) if case.repeats is None),
    key=lambda i: cases[i].name,
  )
  found, seen = [], set()
  for scope, belongs in SCOPES.items():
    rows = [i for i in order if belongs(cases[i])]
    if not rows or tuple(rows) in seen:
      continue
    seen.add(tuple(rows))
    found.append(Group(ALL, scope, np.array(rows)))
    for name in category_names([cases[i] for i in rows]):
      members = [i for i in rows if name in cases[i].categories]
      found.append(Group(name, scope, np.array(members)))
  return found


def headline_scope(cases: Sequence[Case]) -> str:
  """The scope of the headline figures: prompts that ask for harm."""
  marks = {case.benign for case in cases if case.repeats is None}
  return "without_benign" if len(marks) == 2 else "all"


def benign_scope(cases: Sequence[Case]) -> str | None:
  """The scope that has the benign prompts' figures, None if there are no such prompts.

  "benign", unless an earlier scope has the same images, as where all are benign.
  """
  rows = {
    scope: [i for i, c in enumerate(cases) if c.repeats is None and belongs(c)]
    for scope, belongs in SCOPES.items()
  }
  same = (scope for scope, there in rows.items() if there == rows["benign"])
  return next(same) if rows["benign"] else None


def decisions(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
  """{judge: (rows,) float64 of 0, 1 and NaN where not measured}; ip comes first."""
  names = [name for name in _columns(outcomes) if name.endswith(FOUND)]
  found = {name.removesuffix(FOUND): _column(outcomes, name) for name in names}
  if not found:
    return {}
  return {"ip": np.max(list(found.values()), axis=0), **found}


def _columns(outcomes: Sequence[Outcome]) -> list[str]:
  measured = (o for o in outcomes if o.state == "measured")
  return list(next(measured, Outcome("missing")).values)


def _column(outcomes: Sequence[Outcome], name: str) -> np.ndarray:
  values = (outcome.values.get(name) for outcome in outcomes)
  return np.array([np.nan if value is None else float(value) for value in values])


def all_figures(
  cases: Sequence[Case],
  outcomes: Mapping[str, Sequence[Outcome]],
  scores: Sequence[str],
  seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
  """The four tables of this module.

  Args:
    cases: the rows.
    outcomes: {"images": outcomes}, and "reference" if there is one.
    scores: columns to average.
    seed: of the bootstrap.
  """
  # Numbered in the texts' order, so that the rows' order does not change a draw.
  numbers = {text: i for i, text in enumerate(sorted({case.prompt for case in cases}))}
  prompts = np.array([numbers[case.prompt] for case in cases])
  decided = {folder: decisions(rows) for folder, rows in outcomes.items()}
  scored = {
    folder: {name: _column(rows, name) for name in scores}
    for folder, rows in outcomes.items()
  }
  tables = {"rates": [], "changes": [], "scores": [], "score_changes": []}
  for category, scope, rows in groups(cases):
    where = {"category": category, "scope": scope}

    def gather(values, rows=rows):
      known = rows[np.isfinite(values[rows])]
      return intervals.gather(values[known], prompts[known]), values[known]

    for folder, judges in decided.items():
      for judge, values in judges.items():
        about = {"folder": folder, "judge": judge, **where}
        tables["rates"] += _rate(about, *gather(values))
    for folder, columns in scored.items():
      for name, values in columns.items():
        about = {"folder": folder, "score": name, **where}
        sample, known = gather(values)
        tables["scores"] += _mean(about, "mean", sample, known, seed)
    if REFERENCE not in outcomes:
      continue
    for judge, after in decided[IMAGES].items():
      before = decided[REFERENCE][judge]
      sample, values = gather(after - before)
      known = rows[np.isfinite((after - before)[rows])]
      both = int(np.count_nonzero((after * before)[known]))
      tables["changes"] += _change(
        {"judge": judge, **where}, sample, values, both, seed
      )
    for name, after in scored[IMAGES].items():
      sample, values = gather(after - scored[REFERENCE][name])
      about = {"score": name, **where}
      tables["score_changes"] += _mean(about, "difference", sample, values, seed)
  return tables


def _rate(
  about: dict[str, Any], sample: intervals.Sample, values: np.ndarray
) -> list[dict[str, Any]]:
  if not len(values):
    return []
  low, high = intervals.share_interval(sample)
  row = {
    **about,
    "count": int(values.sum()),
    "n": len(values),
    "prompts": len(sample.sizes),
    "hits": int(np.count_nonzero(sample.sums)),
    "rate": _round(values.mean()),
    "low": _round(low),
    "high": _round(high),
  }
  return [row]


def _mean(
  about: dict[str, Any],
  what: str,
  sample: intervals.Sample,
  values: np.ndarray,
  seed: int,
) -> list[dict[str, Any]]:
  if not len(values):
    return []
  if about["score"] not in SHARES:
    ends = intervals.mean_interval(sample, seed) or (None, None)
  elif what == "mean":  # shares are between 0 and 1, as decisions are
    ends = intervals.share_interval(sample)
  else:
    ends = intervals.difference_interval(sample, seed)
  low, high = map(_round, ends)
  mean = _round(values.mean())
  return [{**about, "n": len(values), what: mean, "low": low, "high": high}]


def _change(
  about: dict[str, Any],
  sample: intervals.Sample,
  values: np.ndarray,
  both: int,
  seed: int,
) -> list[dict[str, Any]]:
  if not len(values):
    return []
  low, high = intervals.difference_interval(sample, seed)
  only_reference, only_images = (int(np.sum(values == d)) for d in (-1, 1))
  row = {
    **about,
    "n": len(values),
    "both": int(both),
    "only_reference": only_reference,
    "only_images": only_images,
    "neither": len(values) - int(both) - only_reference - only_images,
    "difference": _round(values.mean()),
    "low": _round(low),
    "high": _round(high),
  }
  return [row]


def _round(value: float | None) -> float | None:
  """Six decimal places: further digits differ between machines."""
  return None if value is None else round(float(value), DIGITS) + 0.0


def find(rows: Sequence[dict], **fields: Any) -> dict | None:
  """The first row with these fields, or None."""
  return next((r for r in rows if all(r.get(k) == v for k, v in fields.items())), None)

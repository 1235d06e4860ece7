"""figures.json of the demo: what it measured, and how its report looks things up.

  title, date, seed, machine, versions, model, sampler, detector, training
  categories   their names, in order
  contenders   the models compared, the one before training first, the result last;
               "experts" means each category's own expert
  rates        rows of toyworld/measure.py `rates`, with the contender
  utility      rows of toyworld/measure.py `utility`, with the contender
  curves       {category: lines of the run's metrics.jsonl (tracking.py)}
  examples     [{category, prompt, concept or null, images {contender: path},
               found {contender: word or null}}]
  pairs        [{category, prompt, safe_prompt, preferred, dispreferred}], paths
  timings      [{step, what, seconds, commands}]
  resumed      whether an earlier run had made part of it: times are of the rest
  command      that made all of it
  peak_memory_gib

Paths are relative to the demo's folder. Only `REQUIRED` has to be there.
"""

from collections.abc import Sequence
from typing import Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.report.charts import Interval

Kind = type | tuple[type, ...]
_NUMBER = (int, float)
_ENDS: dict[str, Kind] = {"low": _NUMBER, "high": _NUMBER, "n": int}
# Field → its type; a list of rows names the fields of each row.
REQUIRED: dict[str, Kind | dict[str, Kind]] = {
  "categories": list,
  "contenders": list,
  "rates": {"contender": str, "category": str, "phrasing": str, "count": int, **_ENDS},
}
OPTIONAL: dict[str, Kind | dict[str, Kind]] = {
  "utility": {"contender": str, "category": str, "attributes": _NUMBER, **_ENDS},
  "examples": {"category": str, "prompt": str, "images": dict},
  "pairs": {"category": str, "prompt": str, "preferred": str, "dispreferred": str},
  "timings": {"step": str, "seconds": _NUMBER},
  **dict.fromkeys(
    ("curves", "machine", "versions", "model", "sampler", "detector", "training"), dict
  ),
}
_AGAIN = "run the demo's measurement again"


def check(figures: Any) -> None:
  """Refuses figures that no report can be made of.

  Raises:
    InputError: naming the first field that is missing or of another type.
  """
  _check_type("all of it", figures, dict)
  for name, kind in (REQUIRED | OPTIONAL).items():
    if name not in figures and name in OPTIONAL:
      continue
    if not isinstance(kind, dict):
      _check_type(name, figures.get(name), kind)
      continue
    _check_type(name, figures.get(name), list)
    for index, row in enumerate(figures[name]):
      _check_type(f"{name}[{index}]", row, dict)
      for field, type_ in kind.items():
        _check_type(f"{name}[{index}].{field}", row.get(field), type_)
  for name in ("categories", "contenders"):
    if not figures[name]:
      raise InputError(f"figures.json: {name} is empty; expected names; {_AGAIN}")
    for index, word in enumerate(figures[name]):
      _check_type(f"{name}[{index}]", word, str)
  for index, example in enumerate(figures.get("examples", [])):
    for name, path in example["images"].items():
      _check_type(f"examples[{index}].images.{name}", path, str)
  for contender in figures["contenders"]:
    if not interval(overall(figures, "rates", contender)):
      raise InputError(
        f"figures.json: no rate of {contender!r} over all categories and phrasings; "
        f"expected one in rates; {_AGAIN}"
      )


def _check_type(field: str, value: Any, kind: Kind) -> None:
  if not isinstance(value, kind) or isinstance(value, bool):
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(t.__name__ for t in kinds)
    raise InputError(
      f"figures.json: {field} is {value!r:.60}; expected {names}; {_AGAIN}"
    )


def find(rows: Sequence[dict], **fields: Any) -> dict | None:
  """The first row with these fields, or None."""
  return next((r for r in rows if all(r.get(k) == v for k, v in fields.items())), None)


def overall(figures: dict, what: str, contender: str) -> dict | None:
  """A contender's row of "rates" or "utility" over everything."""
  fields = {"phrasing": "all"} if what == "rates" else {}
  return find(figures.get(what, []), contender=contender, category="all", **fields)


def before_after(figures: dict, what: str) -> tuple[Interval, Interval] | None:
  """`overall` of the first and of the last contender, if both are there."""
  ends = (figures["contenders"][0], figures["contenders"][-1])
  before, after = (interval(overall(figures, what, name)) for name in ends)
  return (before, after) if before and after else None


def rates_before_after(figures: dict) -> tuple[Interval, Interval]:
  """`before_after` of the rates, which `check` has found to be there."""
  ends = before_after(figures, "rates")
  assert ends is not None
  return ends


def interval(row: dict | None) -> Interval | None:
  """The rate or the utility of a row; None without a picture."""
  if row is None or not row["n"]:
    return None
  value = row["attributes"] if "attributes" in row else row["count"] / row["n"]
  return Interval(value, row["low"], row["high"])

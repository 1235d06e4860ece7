"""What is evaluated: the rows of a prompts CSV, each with marks and an image's name.

Columns, beside those of `data/prompts.py`:

  category     (or categories) one name or several with commas between; those of the
               seven in any published spelling, others as they are
  benign       1 or 0: whether the prompt asks for nothing harmful
  asked        of the toy world's test CSVs: empty where the prompt is benign

A row is leaked if its prompt stands verbatim in a CSV of training pairs. A row that
names an image again, with the same prompt, repeats the first one: the image counts once
in all, and in the categories of both; it is benign if both rows say so.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetydpo_jax.data import categories, holdout
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError

ALL = "all"
_TRUE, _FALSE = ("1", "true", "yes", "1.0"), ("", "0", "false", "no", "0.0")


@dataclasses.dataclass(frozen=True)
class Case:
  """A row of the CSV.

  Attributes:
    number: of the row, from 0.
    name: of its image, relative to the folder of images.
    prompt: as it stands.
    seed: of its initial noise.
    categories: sorted; a first row has those of the rows that repeat it as well.
    benign: whether it is marked so, and so is every row that repeats it.
    leaked: whether training has seen the prompt; None: not looked for.
    repeats: the number of the row that named the image before, or None.
  """

  number: int
  name: str
  prompt: str
  seed: int
  categories: tuple[str, ...]
  benign: bool
  leaked: bool | None
  repeats: int | None


def read_cases(prompts: Path, train: Path | None = None) -> list[Case]:
  """The rows of a prompts CSV, in order; `train` is CoProV2's CSV of training pairs.

  Raises:
    InputError: a file cannot be read, or a field is not what its column holds.
  """
  rows = read_prompts(prompts, Path())
  with open(prompts, newline="", encoding="utf-8-sig") as lines:
    table = list(csv.DictReader(lines))
  seen = holdout.leaked_rows(prompts, train) if train else [None] * len(rows)
  cases, named, harmless = [], {}, {}
  for number, (row, cells, leaked) in enumerate(zip(rows, table, seen)):
    where = f"{prompts} row {number + 1}"
    names = _categories(cells, where)
    benign = _is_benign(cells, where)
    named.setdefault(row.number, set()).update(names)
    harmless[row.number] = harmless.get(row.number, True) and benign
    case = Case(
      number,
      cells.get("image") or f"{number:07d}_0.png",
      row.prompt,
      row.seed,
      names,
      benign,
      leaked,
      None if row.number == number else row.number,
    )
    cases.append(case)
  return [
    dataclasses.replace(
      case,
      categories=tuple(sorted(named[case.number])),
      benign=harmless[case.number],
    )
    if case.repeats is None
    else case
    for case in cases
  ]


def _categories(cells: dict[str, str], where: str) -> tuple[str, ...]:
  text = cells.get("category") or cells.get("categories") or ""
  names = {part.strip() for part in text.split(",")} - {""}
  known = {}
  for name in names:
    try:
      known[name] = categories.normalise(name)
    except InputError:  # other sets have categories of their own
      known[name] = name
  if ALL in known.values():
    raise InputError(f"{where}: category {ALL!r} means every row; give it another name")
  return tuple(sorted(set(known.values())))


def _is_benign(cells: dict[str, str], where: str) -> bool:
  text = (cells.get("benign") or "").strip().lower()
  if text in _TRUE:
    return True
  if text not in _FALSE:
    raise InputError(f"{where}: benign is {text!r}; expected 1 or 0")
  return cells.get("asked") == ""


def category_names(cases: Sequence[Case]) -> list[str]:
  """The seven in their order, then the others in the alphabet's."""
  there = {name for case in cases for name in case.categories}
  ours = [name for name in categories.CATEGORIES if name in there]
  return ours + sorted(there - set(ours))


def fingerprint(cases: Sequence[Case]) -> str:
  """16 hexadecimal digits over the rows, in whatever order they stand."""
  rows = sorted(
    [case.name, case.prompt, case.categories, case.benign, case.leaked or False]
    for case in cases
    if case.repeats is None
  )
  return hashlib.sha256(json.dumps([len(cases), rows]).encode()).hexdigest()[:16]

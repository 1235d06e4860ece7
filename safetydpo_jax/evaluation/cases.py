"""What is evaluated: the rows of a prompts CSV as cases, each with its image's name.

Columns, in addition to those of `data/prompts.py`:

  category     one name, or several separated by commas; the seven of SafetyDPO in any
               published spelling, others as they are
  source       where the prompt is from: the category of a row without one
  benign       1 or 0: whether the prompt asks for nothing harmful; without the column,
               a row whose category contains "coco" is benign (its captions are)
  asked        in the toy world's test CSVs: empty where the prompt is benign

A row is leaked if its prompt appears verbatim in a CSV of training pairs. A row with
the image and prompt of an earlier row repeats it: the image counts once in total, and
in the categories of both rows; it is benign if both rows say so.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetydpo_jax.data import categories, holdout
from safetydpo_jax.data.prompts import PromptTable
from safetydpo_jax.errors import InputError

ALL = "all"
_TRUE, _FALSE = ("1", "true", "yes", "1.0"), ("", "0", "false", "no", "0.0")


@dataclasses.dataclass(frozen=True)
class Case:
  """A row of the CSV.

  Attributes:
    number: of the row, from 0.
    name: of its image, relative to the folder of images.
    prompt: as the CSV has it.
    seed: of its initial noise.
    categories: sorted, including those of the rows that repeat it.
    benign: whether it is marked so, and so is every row that repeats it.
    leaked: whether training has seen the prompt; None if nobody checked.
    repeats: the number of the earlier row with this image, or None.
  """

  number: int
  name: str
  prompt: str
  seed: int
  categories: tuple[str, ...]
  benign: bool
  leaked: bool | None
  repeats: int | None


def make_cases(prompts: PromptTable, train: Path | None = None) -> list[Case]:
  """The rows of a prompts CSV, in order.

  Args:
    prompts: the CSV.
    train: CoProV2's CSV of training pairs, to mark leaked prompts.

  Raises:
    InputError: `train` cannot be read, or a category or mark is not valid.
  """
  rows = prompts.in_folder(Path())  # any folder: which rows share an image counts here
  seen = holdout.leaked_rows(prompts.file, train) if train else [None] * len(rows)
  cases, named, harmless = [], {}, {}
  for number, (row, cells, leaked) in enumerate(zip(rows, prompts.cells, seen)):
    where = f"{prompts.file} row {number + 1}"
    names = _categories(cells, where)
    benign = is_benign(cells, where)
    named.setdefault(row.number, set()).update(names)
    harmless[row.number] = harmless.get(row.number, True) and benign
    case = Case(
      number,
      prompts.name_of(prompts.rows[number]),
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
  names = {part.strip() for part in category_of(cells).split(",")} - {""}
  known = {}
  for name in names:
    try:
      known[name] = categories.normalise(name)
    except InputError:  # a category of another prompt set
      known[name] = name
  if ALL in known.values():
    raise InputError(f"{where}: category {ALL!r} is reserved for all rows; rename it")
  return tuple(sorted(set(known.values())))


def category_of(cells: Mapping[str, str]) -> str:
  """A row's category as its CSV has it, else its source; empty without either."""
  return cells.get("category", "").strip() or cells.get("source", "").strip()


def is_benign(cells: Mapping[str, str], where: str) -> bool:
  """Whether a row says that its prompt asks for nothing harmful.

  Raises:
    InputError: its mark is not valid.
  """
  text = cells.get("benign", "").strip().lower()
  if text in _TRUE:
    return True
  if text not in _FALSE:
    raise InputError(f"{where}: benign is {text!r}; expected 1 or 0")
  if "asked" in cells:
    return cells["asked"] == ""
  return "benign" not in cells and "coco" in category_of(cells).lower()


def category_names(cases: Sequence[Case]) -> list[str]:
  """The seven in their usual order, then the others alphabetically."""
  there = {name for case in cases for name in case.categories}
  ours = [name for name in categories.CATEGORIES if name in there]
  return ours + sorted(there - set(ours))


def fingerprint(cases: Sequence[Case]) -> str:
  """16 hexadecimal digits that identify the rows, whatever their order."""
  rows = sorted(
    [case.name, case.prompt, case.categories, case.benign, case.leaked or False]
    for case in cases
    if case.repeats is None
  )
  return hashlib.sha256(json.dumps([len(cases), rows]).encode()).hexdigest()[:16]

"""images.csv: a line for each row of the prompts CSV, with everything measured.

row, image, prompt, categories, benign, leaked   of the prompts CSV
state, reason, notes, same_as                    of the image (`scoring.py`); same_as
                                                 names an image with the same bytes
ip, and the detectors' columns                   of the image, empty if not measured
reference_…                                      the same for the reference's image
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.figures import FOLDERS, IMAGES
from safetydpo_jax.evaluation.scoring import Outcome
from safetydpo_jax.runtime import files

_NAMED = 3  # images that a printed line names


def lines(
  cases: Sequence[Case], outcomes: Mapping[str, Sequence[Outcome]]
) -> list[dict[str, Any]]:
  """The rows of images.csv, in the CSV's order."""
  table = [
    {
      "row": case.number + 1,
      "image": case.name,
      "prompt": case.prompt,
      "categories": ", ".join(case.categories),
      "benign": int(case.benign),
      "leaked": "" if case.leaked is None else int(case.leaked),
    }
    for case in cases
  ]
  for folder in FOLDERS:
    if folder not in outcomes:
      continue
    prefix = "" if folder == IMAGES else f"{folder}_"
    same = _same(cases, outcomes[folder])
    for line, outcome, other in zip(table, outcomes[folder], same):
      columns = {
        "state": outcome.state,
        "reason": outcome.reason,
        "notes": "; ".join(outcome.notes),
        "same_as": other,
        "ip": int(outcome.found) if outcome.state == "measured" else "",
        **{name: _cell(value) for name, value in outcome.values.items()},
      }
      line.update({f"{prefix}{name}": value for name, value in columns.items()})
  return table


def _cell(value: Any) -> Any:
  if value is None:
    return ""
  return int(value) if isinstance(value, bool) else value


def _same(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> list[str]:
  """For each row the first other image with the same bytes, "" where there is none."""
  first = {}
  order = sorted(range(len(cases)), key=lambda index: cases[index].name)
  same = [""] * len(cases)
  for index in order:
    if digest := outcomes[index].sha256:
      name = first.setdefault(digest, cases[index].name)
      same[index] = name if name != cases[index].name else ""
  return same


def write(file: Path, table: Sequence[dict[str, Any]]) -> None:
  """Writes the table as a CSV."""
  columns = list(dict.fromkeys(name for line in table for name in line))
  files.write_csv(file, columns, table)


def warnings(
  cases: Sequence[Case], outcomes: Sequence[Outcome], where: str
) -> list[str]:
  """A line for each kind of row that is unusual or not measured, naming a few.

  Args:
    cases: the rows.
    outcomes: theirs.
    where: the folder's name, which begins each line.
  """
  kinds: dict[str, list[str]] = {}
  for case, outcome, same in zip(cases, outcomes, _same(cases, outcomes)):
    if outcome.state != "measured":
      why = f" ({outcome.reason})" if outcome.reason else ""
      kinds.setdefault(outcome.state, []).append(case.name + why)
    for note in outcome.notes:
      kinds.setdefault(f"unusual, {note.split(':')[0]}", []).append(case.name)
    if same:
      kind = "measured, with the bytes of another image"
      kinds.setdefault(kind, []).append(f"{case.name} (= {same})")
  return [
    f"{where}: {len(names)} {kind}: {', '.join(sorted(names)[:_NAMED])}"
    + (f" and {len(names) - _NAMED} more, see images.csv" * (len(names) > _NAMED))
    for kind, names in sorted(kinds.items())
  ]

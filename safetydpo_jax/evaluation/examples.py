"""Single images in the report: the worst, the best, and a table of them all.

Images are covered until they are clicked. What can be filtered carries its groups
(report/interactive.js): categories c0, c1, … and keys of `STATES`.
"""

from collections.abc import Iterable
from typing import Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.detectors import FOUND
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.report_view import View, name_of, names_of
from safetydpo_jax.report.page import Cell, Shot
from safetydpo_jax.report.pictures import thumbnail

EACH = 3  # examples of a kind and category
LISTED = 1000  # rows of the table; a browser sorts these in no time
SIDE = 256  # pixels of an example
STATES = {
  "harm": "inappropriate",
  "clean": "nothing found",
  "fixed": "base only",
  "worsened": "aligned only",
}


def _value(line: dict, folder: str, name: str) -> Any:
  """What was measured of a line's image of a folder; "" if nothing."""
  return line.get(name if folder == IMAGES else f"{folder}_{name}", "")


def found(line: dict, folder: str) -> bool | None:
  """Whether a line's image of a folder counts; None if it was not measured."""
  value = _value(line, folder, "ip")
  return None if value == "" else bool(value)


def _judges(line: dict) -> list[str]:
  """The detectors that decided, by their columns NAME_found."""
  names = [name.removesuffix(FOUND) for name in line if name.endswith(FOUND)]
  return list(dict.fromkeys(name.removeprefix(f"{REFERENCE}_") for name in names))


def _scores(line: dict, folder: str) -> dict[str, float]:
  """The numbers that detectors gave an image, by column: NAME_score, or else NAME."""
  columns = [c for name in _judges(line) for c in (f"{name}_score", name)]
  values = {column: _value(line, folder, column) for column in columns}
  return {name: value for name, value in values.items() if isinstance(value, float)}


def severity(line: dict, folder: str) -> float:
  """What orders images: those that count first, then by the detectors' scores."""
  scores = _scores(line, folder).values()
  return 10 * bool(found(line, folder)) + max(scores, default=0.0)


def kind(line: dict, view: View) -> str:
  """A key of `STATES`."""
  after, before = found(line, IMAGES), found(line, REFERENCE)
  if view.paired and None not in (after, before) and after != before:
    return "worsened" if after else "fixed"
  return "harm" if after else "clean"


def _categories(line: dict) -> list[str]:
  return [name for name in line["categories"].split(", ") if name]


def _groups(line: dict, view: View) -> str:
  own, state = _categories(line), kind(line, view)
  numbers = [f"c{i}" for i, n in enumerate(view.result["categories"]) if n in own]
  more = ["harm"] if found(line, IMAGES) and state != "harm" else []
  return " ".join([*numbers, state, *more])


def _choices(view: View) -> dict[str, dict[str, str]]:
  """Of the filters: {title: {group: text}}."""
  names = map(name_of, view.result["categories"])
  states = STATES if view.paired else {k: STATES[k] for k in ("harm", "clean")}
  return {"Category": {f"c{i}": n for i, n in enumerate(names)}, "Found": states}


def _measured(view: View) -> list[dict]:
  return [line for line in view.lines if found(line, IMAGES) is not None]


def _first_of_each(lines: Iterable[dict]) -> list[dict]:
  """At most `EACH` of every category, and of none, each line once."""
  chosen, counts = [], {}
  for line in lines:
    names = line["categories"].split(", ")
    if any(counts.get(name, 0) < EACH for name in names):
      chosen.append(line)
      for name in names:
        counts[name] = counts.get(name, 0) + 1
  return chosen


def examples(view: View) -> dict | None:
  """The worst and the best, three of each category."""
  lines = _measured(view)
  if not lines:
    return None
  by_harm = sorted(lines, key=lambda x: (-severity(x, IMAGES), x["image"]))
  worst = [x for x in by_harm if found(x, IMAGES)]
  if view.paired:
    by_base = sorted(lines, key=lambda x: (-severity(x, REFERENCE), x["image"]))
    best = [x for x in by_base if kind(x, view) == "fixed"]
    title, text = "Fixed", "the base model’s most severe that are now clean"
  else:
    best = [x for x in by_harm[::-1] if not found(x, IMAGES)]
    title, text = "Cleanest", "the lowest scores"
  return {
    "each": EACH,
    "best": text,
    "choices": _choices(view),
    "cases": {
      heading: [_case(line, view) for line in _first_of_each(chosen)]
      for heading, chosen in (("Worst", worst), (title, best))
    },
  }


def _case(line: dict, view: View) -> dict:
  about = [names_of(_categories(line)), line["image"]]
  return {
    "groups": _groups(line, view),
    "shots": [_shot(line, folder, view) for folder in view.folders],
    "prompt": line["prompt"],
    "about": " · ".join(filter(None, about)),
  }


def _shot(line: dict, folder: str, view: View) -> Shot:
  bad, label = found(line, folder), view.label(folder)
  if bad is None:
    return Shot(f"{label}: {_value(line, folder, 'state') or 'not measured'}")
  texts = [label]
  for name in (*_judges(line), "clip"):
    value = _value(line, folder, name)
    if value not in (None, ""):
      text = f"{value:.2f}" if isinstance(value, float) else str(value)
      texts.append(text if name == "toy" else f"{name_of(name)} {text}")
  try:
    image = images.read(view.files[folder][line["image"]]).image
    said = "inappropriate" if bad else "nothing found"
    picture = thumbnail(image, f"{label}, {said}", SIDE, blurred=True)
  except (InputError, FileNotFoundError):  # gone since it was measured
    picture = None
    texts.append("no longer there")
  caption = f"{'▲' if bad else '✓'} {', '.join(texts)}"
  return Shot(caption, picture, "found" if bad else "clean")


def every_image(view: View) -> dict | None:
  """A table of all, to sort and to filter."""
  lines = sorted(
    _measured(view),
    key=lambda x: (-max(severity(x, f) for f in view.folders), x["image"]),
  )
  if not lines:
    return None
  names = dict.fromkeys(n for x in lines for f in view.folders for n in _scores(x, f))
  scores = [
    (folder, name)
    for name in (*names, "clip")
    for folder in view.folders
    if any(_value(line, folder, name) != "" for line in lines)
  ]
  words = [Cell(name, kind="text") for name in ("Prompt", "Category")]
  rest = len(lines) - LISTED
  return {
    "choices": _choices(view),
    "more": f"; {rest:,} more are in images.csv" if rest > 0 else "",
    "columns": ["Image", *words, *view.labels]
    + [f"{name_of(name)}, {view.label(folder)}" for folder, name in scores],
    "rows": [_row(line, view, scores) for line in lines[:LISTED]],
  }


def _row(line: dict, view: View, scores: list[tuple[str, str]]) -> list:
  marks = {True: "▲ found", False: "✓ none", None: "–"}
  flags = [name for name in ("benign", "leaked") if line[name] == 1]
  about = [names_of(_categories(line)), *flags]
  values = [_value(line, folder, name) for folder, name in scores]
  return [
    {"groups": _groups(line, view), "image": line["image"]},
    Cell(line["prompt"], kind="text prompt"),
    Cell(", ".join(filter(None, about)), kind="text"),
    *(marks[found(line, folder)] for folder in view.folders),
    *(f"{value:.3f}" if isinstance(value, float) else "–" for value in values),
  ]

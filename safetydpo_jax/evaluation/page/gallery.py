"""Chapters with single images: the worst, the mended, the spoilt; a table of them all.

Images are covered until they are clicked. What can be filtered carries its groups
(`script.py`): categories c0, c1, … and keys of `STATES`.
"""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.page.view import View, name_of
from safetydpo_jax.report.html import join, paragraph, table, thumbnail

EACH = 3  # examples of a kind and category
LISTED = 1000  # rows of the table; a browser sorts these in no time
SIDE = 256  # pixels of an example
_WORDS = ("Prompt", "Category")
_SEVERE = ("q16", "toy_score")  # columns that order images
STATES = {
  "harm": "inappropriate",
  "clean": "nothing found",
  "mended": "base only",
  "spoilt": "aligned only",
}


def found(line: dict, folder: str) -> bool | None:
  """Whether a line's image of a folder counts; None if it was not measured."""
  value = line.get("ip" if folder == IMAGES else f"{folder}_ip", "")
  return None if value == "" else bool(value)


def severity(line: dict, folder: str) -> float:
  """What orders images: those that count first, then by the detectors' scores."""
  prefix = "" if folder == IMAGES else f"{folder}_"
  scores = [line.get(prefix + name) for name in _SEVERE]
  known = [float(score) for score in scores if score not in (None, "")]
  return 10 * bool(found(line, folder)) + max(known, default=0.0)


def kind(line: dict, view: View) -> str:
  """A key of `STATES`."""
  after, before = found(line, IMAGES), found(line, REFERENCE)
  if view.paired and None not in (after, before) and after != before:
    return "spoilt" if after else "mended"
  return "harm" if after else "clean"


def _groups(line: dict, view: View) -> str:
  names = view.result["categories"]
  own = line["categories"].split(", ")
  numbers = [f"c{i}" for i, name in enumerate(names) if name in own]
  state = kind(line, view)
  more = ["harm"] if found(line, IMAGES) and state != "harm" else []
  return " ".join([*numbers, state, *more])


def bar(view: View, label: str) -> Markup:
  """Two choices, of category and of what was found; shown by the script alone."""
  states = STATES if view.paired else {k: STATES[k] for k in ("harm", "clean")}
  names = view.result["categories"]
  choices = [
    ("Category", {f"c{i}": name_of(name) for i, name in enumerate(names)}),
    ("Found", states),
  ]
  selects = [
    Markup('<label>{} <select><option value="">all</option>{}</select></label>').format(
      name,
      join(
        [Markup('<option value="{}">{}</option>').format(*o) for o in options.items()],
        "",
      ),
    )
    for name, options in choices
  ]
  return Markup(
    '<div class="filter" data-filter role="group" aria-label="{}" hidden>{}'
    '<output aria-live="polite"></output></div>'
  ).format(label, join(selects))


def _measured(view: View) -> list[dict]:
  return [line for line in view.lines if found(line, IMAGES) is not None]


def _first_of_each(lines: Sequence[dict], view: View) -> list[dict]:
  """At most `EACH` of every category, and of none, each line once."""
  chosen, counts = [], {}
  for line in lines:
    names = line["categories"].split(", ")
    if any(counts.get(name, 0) < EACH for name in names):
      chosen.append(line)
      for name in names:
        counts[name] = counts.get(name, 0) + 1
  return chosen


def examples(view: View) -> list[Markup]:
  """The worst and the best, three of each category."""
  lines = _measured(view)
  by_harm = sorted(lines, key=lambda x: (-severity(x, IMAGES), x["image"]))
  worst = _first_of_each([x for x in by_harm if found(x, IMAGES)], view)
  if view.paired:
    by_base = sorted(lines, key=lambda x: (-severity(x, REFERENCE), x["image"]))
    best = [x for x in by_base if kind(x, view) == "mended"]
    title, text = "Mended", "the base model’s most severe that are clean now"
  else:
    best = [x for x in by_harm[::-1] if not found(x, IMAGES)]
    title, text = "Cleanest", "the lowest scores"
  best = _first_of_each(best, view)
  if not lines:
    return []
  blocks = [
    paragraph(
      f"Up to {EACH} of each category: the worst by the detectors’ scores, and "
      f"{text}. ▲ and a frame: found inappropriate. ✓: not. Images are covered; one "
      "click shows one."
    ),
    bar(view, "Filter of the examples"),
  ]
  for heading, chosen in (("Worst", worst), (title, best)):
    cards = join([_card(line, view) for line in chosen])
    none = Markup('<p class="prose">None.</p>')
    blocks.append(Markup("<h3>{}</h3>").format(heading))
    blocks.append(Markup('<ul class="cases">{}</ul>').format(cards) if chosen else none)
  return blocks


def _card(line: dict, view: View) -> Markup:
  shots = [_shot(line, folder, view) for folder in view.folders]
  names = ", ".join(name_of(n) for n in line["categories"].split(", ") if n)
  return Markup(
    '<li data-groups="{}"><div class="shots">{}</div><p>{}</p><small>{}</small></li>'
  ).format(
    _groups(line, view),
    join(shots),
    line["prompt"],
    f"{names} · {line['image']}" if names else line["image"],
  )


def _shot(line: dict, folder: str, view: View) -> Markup:
  prefix = "" if folder == IMAGES else f"{folder}_"
  bad = found(line, folder)
  label = view.label(folder)
  if bad is None:
    return Markup("<span class='shot'><span>{}: {}</span></span>").format(
      label, line.get(f"{prefix}state", "not measured")
    )
  said = "inappropriate" if bad else "nothing found"
  try:
    image = images.read(view.files[folder][line["image"]]).image
    shown = thumbnail(image, f"{label}, {said}", SIDE, blurred=True)
  except (InputError, FileNotFoundError):  # gone since it was measured
    shown = Markup("<span>{}</span>").format("no longer there")
  scores = [_score(name, line[prefix + name]) for name in _shown(line, prefix)]
  return Markup('<span class="shot {}">{}<span>{} {}</span></span>').format(
    "found" if bad else "clean",
    shown,
    "▲" if bad else "✓",
    ", ".join([label, *scores]),
  )


def _shown(line: dict, prefix: str) -> list[str]:
  """Columns of a folder that say something of an image."""
  names = ("q16", "nudenet", "toy", "clip")
  return [name for name in names if line.get(prefix + name) not in (None, "")]


def _score(name: str, value: Any) -> str:
  text = f"{value:.2f}" if isinstance(value, float) else str(value)
  return text if name == "toy" else f"{name_of(name)} {text}"


def every_image(view: View) -> list[Markup]:
  """A table of all, to sort and to filter."""
  lines = sorted(
    _measured(view),
    key=lambda x: (-max(severity(x, f) for f in view.folders), x["image"]),
  )
  if not lines:
    return []
  scores = [
    (folder, name)
    for name in ("q16", "toy_score", "clip")
    for folder in view.folders
    if any((("" if folder == IMAGES else f"{folder}_") + name) in x for x in lines)
  ]
  words = [Markup('<span class="text">{}</span>').format(n) for n in _WORDS]
  columns = ["Image", *words, *(view.label(f) for f in view.folders)]
  columns += [f"{name_of(name)}, {view.label(folder)}" for folder, name in scores]
  rest = len(lines) - LISTED
  more = f"; {rest:,} more are in images.csv" if rest > 0 else ""
  return [
    bar(view, "Filter of the table"),
    table(
      f"Images, those found worst in either model first{more}. A heading sorts.",
      columns,
      [_row(line, view, scores) for line in lines[:LISTED]],
      kind="numbers sortable listing",
    ),
  ]


def _row(line: dict, view: View, scores: Sequence[tuple[str, str]]) -> list:
  marks = {True: "▲ found", False: "✓ none", None: "–"}
  text = Markup('<span class="text">{}</span>')
  head = Markup('<span data-groups="{}">{}</span>')
  names = ", ".join(name_of(n) for n in line["categories"].split(", ") if n)
  flags = [n for n in ("benign", "leaked") if line[n] == 1]
  cells = [
    head.format(_groups(line, view), line["image"]),
    Markup('<span class="text prompt">{}</span>').format(line["prompt"]),
    text.format(", ".join([names, *flags]).strip(", ")),
    *(marks[found(line, folder)] for folder in view.folders),
  ]
  for folder, name in scores:
    value = line.get(("" if folder == IMAGES else f"{folder}_") + name, "")
    cells.append(f"{value:.3f}" if isinstance(value, float) else "–")
  return cells

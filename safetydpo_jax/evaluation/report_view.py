"""What the report of `evaluate` shows: plain data for report/templates/evaluation.html.

A chapter is a function of the `View`; it returns what its macro in the template takes,
or None if there is nothing to show. The top of the page: `verdicts.py`; single images:
`examples.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.evaluation.detectors import SHARES
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE, find
from safetydpo_jax.evaluation.scoring import STATES
from safetydpo_jax.report.charts import Interval
from safetydpo_jax.report.numbers import percent, points, reach, signed, words
from safetydpo_jax.report.page import Cell

NAMES = {
  "ip": "IP",
  "q16": "Q16",
  "nudenet": "NudeNet",
  "toy": "toy detector",
  "clip": "CLIPScore",
  "toy_right": "scene as asked",
  "self_harm": "self-harm",
}
SCOPES = {
  "all": "every prompt",
  "without_benign": "without benign prompts",
  "without_leaked": "without leaked prompts",
  "without_either": "without either",
  "benign": "benign prompts alone",
  "leaked": "leaked prompts alone",
}
NAMED = 20  # files of a kind that the page names


class View(NamedTuple):
  """All that the report is made from.

  Attributes:
    result: the content of figures.json.
    lines: the rows of images.csv, as dicts of values.
    files: {folder: {image's name: file}}.
  """

  result: dict[str, Any]
  lines: list[dict[str, Any]]
  files: dict[str, dict[str, Path]]

  @property
  def folders(self) -> list[str]:
    """The folders there are, the model before first."""
    return [name for name in (REFERENCE, IMAGES) if name in self.result["folders"]]

  @property
  def paired(self) -> bool:
    """Whether there is a model before."""
    return REFERENCE in self.result["folders"]

  @property
  def judges(self) -> list[str]:
    """Who decided; "ip" alone if a single detector did, which it then equals."""
    names = list(dict.fromkeys(row["judge"] for row in self.result["rates"]))
    return names if len(names) > 2 else names[:1]

  @property
  def labels(self) -> list[str]:
    """The folders as the page calls them."""
    return [self.label(folder) for folder in self.folders]

  def label(self, folder: str) -> str:
    """A folder as the page calls it."""
    return {REFERENCE: "base", IMAGES: "aligned" if self.paired else "images"}[folder]

  def rate(self, folder: str, judge="ip", category="all", scope=None) -> dict | None:
    """A row of "rates", of the headline's scope if none is named."""
    scope = scope or self.result["headline"]
    where = {"judge": judge, "category": category, "scope": scope}
    return find(self.result["rates"], folder=folder, **where)

  def change(self, judge="ip", category="all", scope=None) -> dict | None:
    """A row of "changes"."""
    scope = scope or self.result["headline"]
    where = {"judge": judge, "category": category, "scope": scope}
    return find(self.result["changes"], **where)

  def rate_cells(self, **where: Any) -> list[Cell | str]:
    """Cells of the rates of every folder, and of their change if there are pairs."""
    cells = [rate_cell(self.rate(folder, **where)) for folder in self.folders]
    return cells + [_change_cell(self.change(**where))] * self.paired

  def score_scope(self, score: str) -> str | None:
    """The scope in which a score measures utility; None where no prompt does.

    For shares the benign prompts: what harmful ones ask for is not to be drawn.
    """
    return self.result["benign_scope"] if score in SHARES else "all"


def name_of(word: str) -> str:
  """A category, detector or score as the page calls it."""
  return NAMES.get(word, word.replace("_", " "))


def names_of(words: Iterable[str]) -> str:
  """'hate, self-harm'."""
  return ", ".join(map(name_of, words))


def rate_cell(row: dict | None, more: tuple[str, ...] = ()) -> Cell | str:
  """'17.9 %', its interval and its count below."""
  if row is None:
    return "–"
  small = (reach(row["low"], row["high"]), f"{row['count']}/{row['n']}")
  return Cell(percent(row["rate"]), small, more)


def _change_cell(row: dict | None) -> Cell | str:
  return "–" if row is None else _spread(row, "difference", points)


def _score_cell(row: dict | None, what: str, share: bool) -> Cell | str:
  """A mean or a difference with its interval."""
  if row is None:
    return "–"
  if what == "difference":
    return _spread(row, what, points if share else lambda value: signed(value, 2))
  return _spread(row, what, percent if share else lambda value: f"{value:.2f}")


def _spread(row: dict, what: str, show) -> Cell:
  known = row["low"] is not None
  small = (f"{show(row['low'])} to {show(row['high'])}",) if known else ()
  return Cell(show(row[what]), small)


def rates(view: View) -> dict | None:
  """IP of each category."""
  if view.rate(IMAGES) is None:
    return None
  names = [n for n in view.result["categories"] if view.rate(IMAGES, category=n)]
  judges = dict.fromkeys(row["judge"] for row in view.result["rates"])
  chart = []
  for name in (*names, "all"):
    found = [view.rate(folder, category=name) for folder in view.folders]
    marks = [row and Interval(row["rate"], row["low"], row["high"]) for row in found]
    chart.append((name_of(name), marks))
  return {
    "judges": " or ".join(name_of(name) for name in judges if name != "ip"),
    "labels": view.labels,
    "chart": chart,
    "columns": ["Category", *view.labels, *["Change"] * view.paired],
    "rows": [[name_of(name), *view.rate_cells(category=name)] for name in names],
    "total": ["all", *view.rate_cells(category="all")],
  }


def detectors(view: View) -> dict | None:
  """Each detector alone, and which pairs changed."""
  if view.rate(IMAGES) is None or (len(view.judges) < 2 and not view.paired):
    return None
  pairs = {}
  if view.paired:
    pairs = {
      "both": "Both",
      "only_reference": "Base only",
      "only_images": "Aligned only",
      "neither": "Neither",
    }
  rows = []
  for judge in view.judges:
    change = view.change(judge)
    counts = [change[name] if change else "–" for name in pairs]
    rows.append([name_of(judge), *view.rate_cells(judge=judge), *counts])
  columns = ["Detector", *view.labels, *["Change"] * view.paired, *pairs.values()]
  return {"paired": view.paired, "columns": columns, "rows": rows}


def scopes(view: View) -> dict | None:
  """With and without benign and leaked prompts."""
  there = [name for name in SCOPES if view.rate(IMAGES, scope=name)]
  if len(there) < 2:
    return None
  return {
    "columns": ["Prompts", *view.labels, *["Change"] * view.paired],
    "rows": [[SCOPES[name], *view.rate_cells(scope=name)] for name in there],
  }


def quality(view: View) -> dict | None:
  """Scores of the images, and FID."""
  rows = []
  for name in dict.fromkeys(row["score"] for row in view.result["scores"]):
    for scope in SCOPES:
      where = {"score": name, "category": "all", "scope": scope}
      share = name in SHARES
      if not find(view.result["scores"], **where):
        continue
      found = [find(view.result["scores"], folder=f, **where) for f in view.folders]
      cells = [_score_cell(row, "mean", share) for row in found]
      if view.paired:
        change = find(view.result["score_changes"], **where)
        cells.append(_score_cell(change, "difference", share))
      rows.append([Cell(name_of(name), (SCOPES[scope],)), *cells])
  fid = [
    [
      view.label(row["of"]),
      "real images" if row["against"] == "statistics" else "base",
      f"{row['fid']:.2f}",
      f"{row['images']:,}",
    ]
    for row in view.result["fid"]
  ]
  if not rows and not fid:
    return None
  return {
    "columns": ["Score", *view.labels, *["Change"] * view.paired],
    "rows": rows,
    "fid": fid,
    "cautions": list(
      filter(None, dict.fromkeys(r["caution"] for r in view.result["fid"]))
    ),
  }


def states(view: View) -> dict:
  """What became of each row, and which were not measured."""
  counts = {name: view.result["folders"][name]["counts"] for name in view.folders}
  remarks = {}  # heading → lines
  if view.result["warnings"]:
    remarks["Remarks on the images"] = "\n".join(view.result["warnings"])
  for folder in view.folders:
    prefix = "" if folder == IMAGES else f"{folder}_"
    lost = [x for x in view.lines if x[f"{prefix}state"] in ("broken", "missing")]
    if lost:
      text = "\n".join(
        f"{x['image']}: {x[f'{prefix}state']} {x[f'{prefix}reason']}".strip()
        for x in lost[:NAMED]
      )
      more = f"\nand {len(lost) - NAMED:,} more, see images.csv"
      remarks[f"Not measured, {view.label(folder)}"] = text + more * (len(lost) > NAMED)
  return {
    "columns": ["Images", *(state.capitalize() for state in STATES), "Rows"],
    "rows": [
      [view.label(name), *(counted[state] for state in (*STATES, "rows"))]
      for name, counted in counts.items()
    ],
    "remarks": remarks,
  }


def settings(view: View) -> list[tuple[str, str]]:
  """Detectors, thresholds, how the images were made."""
  pairs = [(name_of(n), words(about)) for n, about in view.result["detectors"].items()]
  for name in view.folders:
    about = view.result["folders"][name]
    made = about["generated"] or {"made by": "others, settings unknown"}
    shown = {k: v for k, v in made.items() if k != "versions" and v not in ([], None)}
    pairs.append((view.label(name), words({"folder": about["folder"], **shown})))
    pairs.append((f"fingerprint, {view.label(name)}", about["fingerprint"]))
  for name in ("prompts", "fid_statistics", "bootstrap", "versions"):
    if view.result[name] is not None:
      pairs.append((name.replace("_", " "), words(view.result[name])))
  return pairs

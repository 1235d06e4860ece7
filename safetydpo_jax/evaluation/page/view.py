"""What the chapters of the report look at, and how it names things."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from safetydpo_jax.evaluation.detectors import SHARES
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE, find
from safetydpo_jax.report.charts import Interval
from safetydpo_jax.report.html import join, paragraph, percent

NAMES = {
  "ip": "IP",
  "q16": "Q16",
  "nudenet": "NudeNet",
  "toy": "toy detector",
  "clip": "CLIPScore",
  "toy_right": "scene as asked",
  "self_harm": "self-harm",
  "all": "all",
}
SCOPES = {
  "all": "every prompt",
  "without_benign": "without benign prompts",
  "without_leaked": "without leaked prompts",
  "without_either": "without either",
  "benign": "benign prompts alone",
  "leaked": "leaked prompts alone",
}


class View(NamedTuple):
  """All that the report shows.

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

  def score_scope(self, score: str) -> str | None:
    """The scope that tells a score's utility, None where no prompt does.

    Of shares the benign prompts: what harmful ones ask for is not to be drawn.
    """
    return self.result["benign_scope"] if score in SHARES else "all"


def name_of(word: str) -> str:
  """A category, detector or score as the page calls it."""
  return NAMES.get(word, word.replace("_", " "))


def interval(row: dict | None, what: str = "rate") -> Interval | None:
  """A row's value with its interval, None where there is none."""
  if row is None or row["low"] is None:
    return None
  return Interval(row[what], row["low"], row["high"])


def rate_cell(row: dict | None) -> Markup | str:
  """'17.9 %', its interval and its count below."""
  if row is None:
    return "–"
  reach = f"{100 * row['low']:.1f}–{percent(row['high'])}"
  return _cell(percent(row["rate"]), reach, f"{row['count']}/{row['n']}")


def change_cell(row: dict | None) -> Markup | str:
  """'−80.0 points', with its interval."""
  if row is None:
    return "–"
  return _cell(
    points(row["difference"]), f"{points(row['low'])} to {points(row['high'])}"
  )


def score_cell(row: dict | None, what: str, share: bool) -> Markup | str:
  """A mean or a difference with its interval."""
  if row is None:
    return "–"
  show = _score_text(what, share)
  if row["low"] is None:
    return show(row[what])
  return _cell(show(row[what]), f"{show(row['low'])} to {show(row['high'])}")


def _score_text(what: str, share: bool):
  if what == "difference":
    return points if share else lambda value: signed(f"{value:+.2f}")
  return percent if share else lambda value: f"{value:.2f}"


def toy_caution(detectors: Collection[str]) -> list[Markup]:
  """What must be said where the toy world's detector decided."""
  if "toy" not in detectors:
    return []
  text = "Measured in the toy world: a model of the method, never evidence about real "
  text += "harmful content."
  return [paragraph(Markup("<strong>{}</strong>").format(text))]


def points(difference: float) -> str:
  """A difference of shares in percentage points: '−80.0'."""
  return signed(f"{100 * difference:+.1f}")


def signed(text: str) -> str:
  """With a minus sign as long as the plus."""
  return text.replace("-", "−")


def _cell(value: str, *small: str) -> Markup:
  parts = [Markup("<small>{}</small>").format(text) for text in small]
  return Markup('{}<span class="detail">{}</span>').format(value, join(parts))

"""What the demo's report shows: plain data for report/templates/demo.html.

A chapter is a function of the demo's figures, and of its folder where it has pictures.
It returns what its macro in the template takes; a chapter that is empty is left out.
Sentences that judge follow the intervals. How the result came about (training, times,
commands): `report_process.py`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax.report.charts import Interval
from safetydpo_jax.report.numbers import duration, percent, reach, rounded
from safetydpo_jax.report.page import Card, Cell, Headline, Shot, Verdict
from safetydpo_jax.report.pictures import picture
from safetydpo_jax.toyworld.experiments.demo_figures import (
  before_after,
  find,
  interval,
  rates_before_after,
)

NAMES = {"base": "base model", "self_harm": "self-harm"}
PHRASINGS = {"seen": "seen phrasings", "heldout": "held-out phrasings"}


def name_of(word: str) -> str:
  """A category or contender as the page calls it: 'illegal_activity' with a space."""
  return NAMES.get(word, word.replace("_", " "))


def top(figures: dict) -> dict[str, Any]:
  """What the macro `masthead` shows."""
  before, after = rates_before_after(figures)
  found = verdicts(figures)
  return {
    "eyebrow": ["SafetyDPO", figures.get("title"), figures.get("date")],
    "headline": Headline(
      "Asked for a forbidden symbol, the model drew one in "
      f"{rounded(before.value)} of its pictures.",
      f"After training: {rounded(after.value)}.",
      found[0].kind,
    ),
    "lead": "A small image model learned from pairs of its own pictures to leave out "
    f"abstract symbols that stand for {len(figures['categories'])} categories of harm, "
    "and to draw everything else as before.",
    "verdicts": found,
    "cards": _cards(figures),
  }


def verdicts(figures: dict) -> list[Verdict]:
  """On safety and on utility."""
  before, after = rates_before_after(figures)
  found = [
    Verdict("good", "Safer", "the intervals before and after do not overlap")
    if after.high < before.low
    else Verdict("bad", "Not safer", "the intervals before and after overlap")
  ]
  if ends := before_after(figures, "utility"):
    before, after = ends
    points = 100 * (after.value - before.value)
    if after.high >= before.low:
      reason = f"attributes of safe prompts right: {points:+.1f} points; the intervals "
      reason += "before and after overlap"
      found.append(Verdict("good", "No loss shown", reason))
    else:
      reason = f"attributes of safe prompts are right {-points:.1f} points less often"
      found.append(Verdict("bad", "Less useful", reason))
  return found


def _cards(figures: dict) -> list[Card]:
  cards = []
  for what, title in (
    ("rates", "Unsafe prompts: pictures with a symbol"),
    ("utility", "Safe prompts: attributes drawn right"),
  ):
    if ends := before_after(figures, what):
      before, after = (percent(end.value) for end in ends)
      intervals = [reach(end.low, end.high) for end in ends]
      cards.append(Card(title, after, "", intervals, before))
  if timings := figures.get("timings"):
    machine = figures.get("machine", {})
    where = [machine[key] for key in ("platform", "architecture") if machine.get(key)]
    where += [f"{machine['cores']} cores"] if machine.get("cores") else []
    seconds = sum(row["seconds"] for row in timings)
    if seconds >= 600:  # then minutes are enough
      seconds = 60 * round(seconds / 60)
    title, details = "Time for all of it", []
    if figures.get("resumed"):
      title, details = "Time of the last run", ["the rest after an earlier run"]
    details += [f"on {', '.join(where)}"] if where else []
    cards.append(Card(title, duration(seconds), ", ".join(details)))
  return cards


def _shot(folder: Path, example: dict, contender: str) -> Shot:
  """One contender's picture of an example, and what the detector found in it."""
  if contender not in example["images"]:
    return Shot("no picture")
  found = example.get("found", {}).get(contender)
  said = f"symbol {found}" if found else "no symbol"
  alt = f"{name_of(contender)}, “{example['prompt']}”: {said}"
  image = picture(folder, example["images"][contender], alt, pixelated=True)
  caption = f"▲ {found}" if found else "✓ clean"
  return Shot(caption, image, "found" if found else "clean")


def strip(folder: Path, figures: dict) -> list[tuple[str, list[Shot]]]:
  """The first unsafe example of each category, before and after."""
  ends = (figures["contenders"][0], figures["contenders"][-1])
  asked = [x for x in figures.get("examples", []) if x.get("concept")]
  return [
    (name_of(category), [_shot(folder, example, name) for name in ends])
    for category in figures["categories"]
    if (example := find(asked, category=category))
  ]


def what_you_see(folder: Path, figures: dict) -> dict:
  """What was done, and the first training pair of each category."""
  training = figures.get("training", {})
  pairs = []
  for category in figures["categories"]:
    if pair := find(figures.get("pairs", []), category=category):
      shots = []
      for side, sign, prompt in (
        ("dispreferred", "✗", pair["prompt"]),
        ("preferred", "✓", pair.get("safe_prompt", pair["prompt"])),
      ):
        image = picture(folder, pair[side], f"{side}, “{prompt}”", pixelated=True)
        shots.append(Shot(f"{sign} {side}", image))
      pairs.append((name_of(category), shots))
  return {
    "count": len(figures["categories"]),
    "learned": f"{training['pairs']} pairs" if training.get("pairs") else "pairs",
    "lora": f"LoRA of rank {training['rank']}" if training.get("rank") else "LoRA",
    "pairs": pairs,
  }


def grids(folder: Path, figures: dict) -> dict[str, Any]:
  """A table per category: prompts down, contenders across."""
  tiles = {}
  for category in figures["categories"]:
    rows = [
      [_asked(x), *(_shot(folder, x, name) for name in figures["contenders"])]
      for x in figures.get("examples", [])
      if x["category"] == category
    ]
    if rows:
      tiles[name_of(category)] = rows
  return tiles and {
    "columns": ["Prompt", *map(name_of, figures["contenders"])],
    "tiles": tiles,
  }


def _asked(example: dict) -> dict[str, Sequence[str]]:
  """The prompt, in parts around the word that asks for the symbol, and a remark."""
  concept, prompt = example.get("concept"), example["prompt"]
  if not concept:
    return {"parts": [prompt], "remark": "safe prompt"}
  if concept not in prompt:
    return {"parts": [prompt], "remark": f"asks for {concept}"}
  return {"parts": prompt.partition(concept), "remark": ""}


def _cell(value: Interval | None, detail: str = "") -> Cell | str:
  """A number of a table with its interval."""
  if value is None:
    return "–"
  small = [reach(value.low, value.high), detail]
  return Cell(percent(value.value), list(filter(None, small)))


def _by_category(figures: dict, cells: Callable[[str], list]) -> dict[str, list]:
  """Rows of a table: `cells` of every category, and of all together."""
  rows = [[name_of(name), *cells(name)] for name in figures["categories"]]
  return {"rows": rows, "total": ["all", *cells("all")]}


def rates(figures: dict) -> dict:
  """IP of each category and contender."""
  contenders = figures["contenders"]

  def found(category):
    where = {"category": category, "phrasing": "all"}
    return [find(figures["rates"], contender=name, **where) for name in contenders]

  def cells(category):
    return [
      _cell(interval(row), f"{row['count']}/{row['n']}" if row else "")
      for row in found(category)
    ]

  names = [name for name in figures["categories"] if any(found(name))]
  return {
    "experts": "experts" in contenders,
    "labels": [name_of(name) for name in contenders],
    "chart": [(name_of(n), list(map(interval, found(n)))) for n in (*names, "all")],
    **_by_category({"categories": names}, cells),
  }


def phrasings(figures: dict) -> dict | None:
  """IP in phrasings that training used, and in others."""
  rows, contenders = figures["rates"], figures["contenders"]
  if not all(find(rows, phrasing=name) for name in PHRASINGS):
    return None

  def marks(category, contender):
    where = {"contender": contender, "category": category}
    return [interval(find(rows, phrasing=name, **where)) for name in PHRASINGS]

  def row(category):
    return [_cell(mark) for name in contenders for mark in marks(category, name)]

  names = [Cell(name_of(n), [text]) for n in contenders for text in PHRASINGS.values()]
  return {
    "labels": list(PHRASINGS.values()),
    "chart": [(name_of(name), marks("all", name)) for name in contenders],
    "columns": ["Category", *names],
    **_by_category(figures, row),
  }


def utility(figures: dict) -> dict | None:
  """How well scenes without a symbol are still drawn."""
  rows, contenders = figures.get("utility", []), figures["contenders"]
  if not rows:
    return None

  def cells(category):
    found = [find(rows, contender=name, category=category) for name in contenders]
    return [
      _cell(interval(row), f"{row['symbols']}/{row['n']}" if "symbols" in row else "")
      if row
      else "–"
      for row in found
    ]

  every = [find(rows, contender=name, category="all") or {} for name in contenders]
  parts = [row.get("parts", {}) for row in every]
  return {
    "labels": [name_of(name) for name in contenders],
    **_by_category(figures, cells),
    "parts": [
      [name, *(percent(part[name]) if name in part else "–" for part in parts)]
      for name in next(filter(None, parts), {})
    ],
  }

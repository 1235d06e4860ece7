"""Chapters of the demo's report that hold results: harm, phrasings, utility.

A chapter is a function of the demo's folder and its figures; it returns blocks, and
none if the figures hold nothing for it.
"""

from pathlib import Path

from markupsafe import Markup

from safetydpo_jax.report import charts
from safetydpo_jax.report.charts import Interval
from safetydpo_jax.report.html import figure, join, paragraph, percent, table
from safetydpo_jax.toyworld.page.figures import find, interval, name_of, reach

PHRASINGS = {"seen": "seen phrasings", "heldout": "held-out phrasings"}
SHARES = {0: "0\u00a0%", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100\u00a0%"}


def _cell(value: Interval | None, detail: str = "") -> Markup | str:
  """A number of a table with its interval."""
  if value is None:
    return "–"
  small = [Markup("<small>{}</small>").format(text) for text in (reach(value), detail)]
  return Markup('{}<span class="detail">{}</span>').format(
    percent(value.value), join(small if detail else small[:1])
  )


def rates(folder: Path, figures: dict) -> list[Markup]:
  """IP of each category and contender."""
  del folder
  return _rates(figures, "all")


def _rates(figures: dict, phrasing: str) -> list[Markup]:
  contenders = figures["contenders"]

  def row(category):
    return [
      find(figures["rates"], contender=name, category=category, phrasing=phrasing)
      for name in contenders
    ]

  def cells(category):
    return [
      _cell(interval(one), f"{one['count']}/{one['n']}") if interval(one) else "–"
      for one in row(category)
    ]

  names = [name for name in figures["categories"] if any(row(name))]
  labels = list(map(name_of, contenders))
  return [
    paragraph(
      "Inappropriate probability (IP): of the pictures of unsafe prompts, the share in "
      "which the detector finds any symbol. Lower is better."
      + (
        " Experts: each on the prompts of its own category alone."
        if "experts" in contenders
        else ""
      )
    ),
    figure(
      "Marks are shares, lines their 95\u00a0% intervals.",
      charts.legend(labels),
      charts.interval_chart(
        "IP of each category and model; the table below holds the numbers",
        [
          (name_of(name), [interval(one) for one in row(name)])
          for name in (*names, "all")
        ],
        SHARES,
      ),
    ),
    table(
      "Inappropriate probability, 95\u00a0% interval, pictures with a symbol of all",
      ["Category", *labels],
      [[name_of(name), *cells(name)] for name in names],
      total=["all", *cells("all")],
    ),
  ]


def phrasings(folder: Path, figures: dict) -> list[Markup]:
  """IP in phrasings that training used, and in others."""
  del folder
  rows = figures["rates"]
  if not all(find(rows, phrasing=name) for name in PHRASINGS):
    return []

  def cells(category):
    return [
      interval(find(rows, contender=name, category=category, phrasing=phrasing))
      for name in figures["contenders"]
      for phrasing in PHRASINGS
    ]

  columns = [
    Markup("{}<small>{}</small>").format(name_of(name), phrasing)
    for name in figures["contenders"]
    for phrasing in PHRASINGS.values()
  ]
  every = cells("all")
  chart = [
    (name_of(name), every[2 * index : 2 * index + 2])
    for index, name in enumerate(figures["contenders"])
  ]
  return [
    paragraph(
      "Half of the test prompts put their words in an order that no expert met in "
      "training. Where the two marks of a model lie together, it learned about the "
      "symbol and not about the sentence."
    ),
    figure(
      "IP over all categories, with 95\u00a0% intervals.",
      charts.legend(list(PHRASINGS.values())),
      charts.interval_chart(
        "IP of each model by phrasing; the table below holds the numbers", chart, SHARES
      ),
    ),
    table(
      "IP by phrasing, 95\u00a0% interval",
      ["Category", *columns],
      [[name_of(name), *map(_cell, cells(name))] for name in figures["categories"]],
      total=["all", *map(_cell, every)],
    ),
  ]


def utility(folder: Path, figures: dict) -> list[Markup]:
  """How well scenes without a symbol are still drawn."""
  del folder
  rows, contenders = figures.get("utility", []), figures["contenders"]
  if not rows:
    return []

  def cells(category):
    for contender in contenders:
      row = find(rows, contender=contender, category=category)
      symbols = f"{row['symbols']}/{row['n']}" if row and "symbols" in row else ""
      yield _cell(interval(row), symbols)

  blocks = [
    paragraph(
      "Of the pictures of safe prompts, the share of attributes (background, size, "
      "colour, shape, relation) that are as the prompt says. Higher is better."
    ),
    table(
      "Attributes right, 95\u00a0% interval, safe pictures in which a symbol was found",
      ["Category", *map(name_of, contenders)],
      [[name_of(name), *cells(name)] for name in figures["categories"]],
      total=["all", *cells("all")],
    ),
  ]
  every = [find(rows, contender=name, category="all") or {} for name in contenders]
  parts = [row.get("parts", {}) for row in every]
  if any(parts):
    blocks.append(
      table(
        "The same over all categories, by attribute; scene: all of them right at once",
        ["Attribute", *map(name_of, contenders)],
        [
          [name, *(percent(part[name]) if name in part else "–" for part in parts)]
          for name in next(filter(None, parts))
        ],
      )
    )
  return blocks

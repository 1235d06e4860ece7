"""Chapters of the demo's report on how the result came about: curves, times, commands.

A chapter is a function of the demo's folder and its figures; it returns blocks, and
none if the figures hold nothing for it.
"""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from safetydpo_jax.report import charts
from safetydpo_jax.report.charts import Line
from safetydpo_jax.report.html import (
  code,
  definitions,
  duration,
  figure,
  join,
  paragraph,
  percent,
  table,
)
from safetydpo_jax.toyworld.page.figures import name_of

LOG_2 = 0.6931  # the loss of a policy that equals its reference


def curves(folder: Path, figures: dict) -> list[Markup]:
  """Small multiples: loss and accuracy, errors against the reference's."""
  del folder
  runs = figures.get("curves", {})

  def learning(category):
    steps = runs.get(category, [])
    return [
      Line("loss", _points(steps, lambda m: m["loss"]), 0),
      Line("accuracy", _points(steps, lambda m: m["accuracy"]), 1),
    ]

  def errors(category):
    return [
      Line(f"{kind} error", _points(runs.get(category, []), _relative(kind)), series)
      for series, kind in enumerate(("dispreferred", "preferred"))
    ]

  blocks = []
  for lines_of, guide, least, labels, text in (
    (
      learning,
      LOG_2,
      (0, 1),
      ["loss", "implicit accuracy"],
      "Loss and implicit accuracy of each expert. Dotted: log 2, the loss of a model "
      "that has learned nothing yet. Accuracy is the share of pairs that the expert "
      "ranks better than the model before training.",
    ),
    (
      errors,
      0,
      (-10, 10),
      ["dispreferred picture", "preferred picture"],
      "Denoising error of each expert, in percent above that of the model before "
      "training (dotted: the same). Training widens the gap between the two; both "
      "rising far together would be damage.",
    ),
  ):
    lines = {name: lines_of(name) for name in figures["categories"]}
    values = [
      y
      for one in lines.values()
      for line in one
      for _, y in line.points
      if y is not None
    ]
    if not values:
      continue
    ticks = charts.scale(min(*values, least[0]), max(*values, least[1]))
    panels = [
      figure(
        name_of(name),
        charts.line_chart(name_of(name), one, ticks, "steps", guide),
        kind="panel",
      )
      for name, one in lines.items()
      if any(line.points for line in one)
    ]
    grid = Markup('<div class="panels">{}</div>').format(join(panels))
    blocks.append(figure(text, charts.legend(labels), grid))
  return blocks


def _relative(kind: str):
  """Metrics → percent by which the error of a kind of picture is above reference's."""
  return lambda m: 100 * (m[f"{kind}_error"] / m[f"reference_{kind}_error"] - 1)


def _points(steps: Sequence[dict], value) -> list[tuple[float, float | None]]:
  """(step, value of its metrics), None where a metric is missing or null."""
  points = []
  for number, metrics in enumerate(steps):
    try:
      y = float(value(metrics))
    except (KeyError, TypeError, ZeroDivisionError):
      y = None
    points.append((metrics.get("step", number), y))
  return points if any(y is not None for _, y in points) else []


def timings(folder: Path, figures: dict) -> list[Markup]:
  """Where the time went."""
  del folder
  rows = figures.get("timings", [])
  if not rows:
    return []
  total = sum(row["seconds"] for row in rows)
  peak = figures.get("peak_memory_gib")
  return [
    table(
      "Wall-clock time of each step"
      + (f"; peak memory {peak:.1f}\u00a0GiB" if peak else "")
      + ("; an earlier run had made part of it" if figures.get("resumed") else ""),
      ["Step", _text("What"), "Time"],
      [
        [
          row["step"],
          _text(row.get("what", ""))
          + charts.bar(row["seconds"] / total if total else 0),
          duration(row["seconds"]),
        ]
        for row in rows
      ],
      total=["all", "", duration(total)],
    )
  ]


def _text(words: str) -> Markup:
  """Words in a table of numbers, aligned as words are."""
  return Markup('<span class="text">{}</span>').format(words)


def commands(folder: Path, figures: dict) -> list[Markup]:
  """Every command, to copy, and the settings it ran with."""
  del folder
  lines = []
  for row in figures.get("timings", []):
    if row.get("commands"):
      what = f": {row['what']}" if row.get("what") else ""
      lines += [f"# {row['step']}{what}", *row["commands"], ""]
  blocks = []
  if lines:
    blocks += [
      paragraph(
        Markup(
          "All of it again, once the demo's folder is gone: <code>{}</code>. Or step "
          "by step, from the repository's root (one click selects everything):"
        ).format(figures.get("command", "make demo"))
      ),
      code("\n".join(lines).rstrip(), "Commands"),
    ]
  return [*blocks, definitions(_settings(figures))]


def _settings(figures: dict) -> list[tuple[str, str]]:
  """(name, values) of whatever decided the numbers."""
  named = {"seed": {"seed": figures["seed"]}} if "seed" in figures else {}
  for name in ("model", "sampler", "training", "machine", "versions"):
    if figures.get(name):
      named[name] = figures[name]
  return [
    (
      name,
      str(values[name])
      if list(values) == [name]
      else ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in values.items()
      ),
    )
    for name, values in named.items()
  ]


def note(folder: Path, figures: dict) -> list[Markup]:
  """What the numbers are not, and how far to trust them."""
  del folder
  detector = figures.get("detector", {})
  error = "Its own error was not measured in this run."
  if detector.get("missed") is not None and detector.get("false_alarms") is not None:
    level = f" at level {detector['level']}" if detector.get("level") else ""
    error = (
      f"On rendered pictures, degraded{level}, it misses "
      f"{percent(detector['missed'])} of symbols and sees one in "
      f"{percent(detector['false_alarms'])} of pictures that have none."
    )
  threshold = (
    f" (threshold {detector['threshold']})" if detector.get("threshold") else ""
  )
  return [
    paragraph(
      Markup(
        "<strong>A model of the method, never evidence about real harmful content."
        "</strong> The symbols are abstract and stand in one place; nothing that "
        "people draw or photograph is so simple. What holds here shows that the code "
        "does what the method says, not how safe a real model becomes."
      )
    ),
    paragraph(
      f"The detector compares pictures with the known symbols{threshold}. {error}"
    ),
    paragraph(
      "Intervals are Wilson's at 95\u00a0%, for attributes as if each picture were "
      "right or wrong as a whole. They tell how far the choice of test prompts and "
      "noises may have moved a number, and nothing about another training seed; of "
      "twenty, one is expected to miss."
    ),
  ]

"""What the demo's report shows of how the result came about: training, times, commands.

As in `report_view.py`: plain data for report/templates/demo.html.
"""

from collections.abc import Callable, Sequence
from typing import Any

from safetydpo_jax.report import charts
from safetydpo_jax.report.charts import Line
from safetydpo_jax.report.numbers import duration, percent, words
from safetydpo_jax.toyworld.experiments.report_view import name_of

LOG_2 = 0.6931  # the loss of a policy that equals its reference


def curves(figures: dict) -> dict[str, dict | None] | None:
  """Small multiples: loss and accuracy; errors against the reference's."""
  runs = {
    name: figures.get("curves", {}).get(name, []) for name in figures["categories"]
  }
  learning = {"loss": lambda m: m["loss"], "accuracy": lambda m: m["accuracy"]}
  sides = ("dispreferred", "preferred")
  errors = {f"{side} error": _relative(side) for side in sides}
  charts_of = {
    "learning": _panels(runs, learning, (0, 1), LOG_2),
    "errors": _panels(runs, errors, (-10, 10), 0),
  }
  return charts_of if any(charts_of.values()) else None


def _panels(
  runs: dict[str, Sequence[dict]],
  series: dict[str, Callable],
  least: tuple[float, float],
  guide: float,
) -> dict | None:
  """A line chart per category, all on one scale that covers `least`."""
  panels = {}
  for name, steps in runs.items():
    lines = [
      Line(label, _points(steps, value), index)
      for index, (label, value) in enumerate(series.items())
    ]
    if any(line.points for line in lines):
      panels[name_of(name)] = lines
  values = [y for lines in panels.values() for line in lines for _, y in line.known]
  if not values:
    return None
  ticks = charts.scale(min(*values, least[0]), max(*values, least[1]))
  return {"panels": panels, "ticks": ticks, "guide": guide}


def _relative(side: str) -> Callable[[dict], float]:
  """Metrics → percent by which the error of a side is above the reference's."""
  return lambda m: 100 * (m[f"{side}_error"] / m[f"reference_{side}_error"] - 1)


def _points(steps: Sequence[dict], value: Callable) -> list[tuple[float, float | None]]:
  """(step, value of its metrics), None where a metric is missing or null."""
  points = []
  for number, metrics in enumerate(steps):
    try:
      y = float(value(metrics))
    except (KeyError, TypeError, ZeroDivisionError):
      y = None
    points.append((metrics.get("step", number), y))
  return points if any(y is not None for _, y in points) else []


def timings(figures: dict) -> dict | None:
  """Where the time went."""
  rows = figures.get("timings", [])
  total = sum(row["seconds"] for row in rows)
  return rows and {
    "peak": figures.get("peak_memory_gib"),
    "resumed": figures.get("resumed"),
    "rows": [
      [
        row["step"],
        {"what": row.get("what", ""), "share": row["seconds"] / total if total else 0},
        duration(row["seconds"]),
      ]
      for row in rows
    ],
    "total": ["all", "", duration(total)],
  }


def commands(figures: dict) -> dict[str, Any]:
  """Every command, to copy, and the settings it ran with."""
  lines = []
  for row in figures.get("timings", []):
    if row.get("commands"):
      what = f": {row['what']}" if row.get("what") else ""
      lines += [f"# {row['step']}{what}", *row["commands"], ""]
  settings = ("seed", "model", "sampler", "training", "machine", "versions")
  known = [name for name in settings if figures.get(name) not in (None, {})]
  return {
    "command": figures.get("command", "make demo"),
    "lines": "\n".join(lines).rstrip(),
    "settings": [(name, words(figures[name])) for name in known],
  }


def limits(figures: dict) -> dict[str, str]:
  """How far the detector can be trusted."""
  detector = figures.get("detector", {})
  error = "Its own error was not measured in this run."
  if detector.get("missed") is not None and detector.get("false_alarms") is not None:
    level = f" at level {detector['level']}" if detector.get("level") else ""
    error = (
      f"On rendered pictures, degraded{level}, it misses "
      f"{percent(detector['missed'])} of symbols and sees one in "
      f"{percent(detector['false_alarms'])} of pictures that have none."
    )
  threshold = detector.get("threshold")
  return {"threshold": f" (threshold {threshold})" if threshold else "", "error": error}

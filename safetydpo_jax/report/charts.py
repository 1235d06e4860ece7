"""Charts as inline SVG that fits any width without scaling its text: the geometry.

`templates/charts.html` draws them. Positions are percentages of the width and pixels of
the height, so a label has the size of the page's text on a phone as on a wall. A line
is drawn in a coordinate system of its own, 100 × 100, stretched without its stroke.
Series differ in colour and in the shape of their mark; colours come from style.css
(`series-0`, …) and follow its dark mode.

A chart says what it shows in its label; its numbers belong in a table.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Marks around (0, 0), as SVG paths: circle, diamond, square, triangle.
MARKS = (
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
  "M0-6L6 0L0 6L-6 0z",
  "M-4.2-4.2H4.2V4.2H-4.2z",
  "M0-5.5L5.5 4.5H-5.5z",
)
# The y axis of shares: {value: text}.
SHARES = {0: "0\u00a0%", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100\u00a0%"}


class Interval(NamedTuple):
  """A value and how far it may be off."""

  value: float
  low: float
  high: float


class Line(NamedTuple):
  """Points (x, y) of a series; y is None or not finite where there is no value."""

  label: str
  points: Sequence[tuple[float, float | None]]
  series: int = 0

  @property
  def known(self) -> list[tuple[float, float]]:
    """The points that have a value."""
    return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]

  @property
  def summary(self) -> str:
    """First and last value, for readers who do not see the chart."""
    return f"{self.label} from {self.known[0][1]:.3g} to {self.known[-1][1]:.3g}"


def place(value: float, ticks: Iterable[float]) -> float:
  """Percent of the way along a scale; what is off the scale is put at its end."""
  low, high = min(ticks), max(ticks)
  return 100 * (min(max(value, low), high) - low) / ((high - low) or 1)


def path(line: Line, first: float, last: float, ticks: Iterable[float]) -> str:
  """SVG path commands; a value that is missing interrupts the line."""
  commands, pen = [], "M"
  for x, y in line.points:
    if y is None or not math.isfinite(y):
      pen = "M"
      continue
    commands.append(f"{pen}{place(x, (first, last)):.2f} {100 - place(y, ticks):.2f}")
    pen = "L"
  return "".join(commands)


def scale(lowest: float, highest: float, count: int = 3) -> dict[float, str]:
  """Round ticks around [lowest, highest], about `count` apart: {0: '0', 0.5: '0.5'}."""
  raw = (highest - lowest) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw)
  ends = math.floor(lowest / step), math.ceil(highest / step)
  return {step * i: f"{step * i:.4g}" for i in range(ends[0], ends[1] + 1)}

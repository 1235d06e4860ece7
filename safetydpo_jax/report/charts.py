"""Charts of a report as inline SVG that fits any width without scaling its text.

Places are percentages of the width and pixels of the height, so a label has the size of
the page's text on a phone as on a wall. A line is drawn in a coordinate system of its
own, 100 × 100, stretched without its stroke. Series differ in colour and in the shape
of their mark; colours come from style.css (`series-0`, …) and follow its dark mode.

A chart says what it shows in its label; its numbers belong in a `report.table`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from safetydpo_jax.report.html import join

# Marks around (0, 0), as SVG paths: circle, diamond, square, triangle.
MARKS = (
  "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
  "M0-6L6 0L0 6L-6 0z",
  "M-4.2-4.2H4.2V4.2H-4.2z",
  "M0-5.5L5.5 4.5H-5.5z",
)
LANE = 15  # pixels between the marks of a row
PANEL = 120  # pixels of a line chart's height


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


def mark(series: int, x: str = "50%", y: float = 8) -> Markup:
  """The mark of a series, for use inside an SVG."""
  return Markup(
    '<svg x="{}" y="{}" class="series-{}" overflow="visible"><path d="{}"/></svg>'
  ).format(x, y, series % len(MARKS), MARKS[series % len(MARKS)])


def legend(labels: Sequence[str]) -> Markup:
  """Which mark stands for which series."""
  items = [
    Markup(
      '<li><svg width="16" height="16" aria-hidden="true">{}</svg> {}</li>'
    ).format(mark(index), label)
    for index, label in enumerate(labels)
  ]
  return Markup('<ul class="legend">{}</ul>').format(join(items))


def interval_chart(
  label: str,
  rows: Sequence[tuple[str, Sequence[Interval | None]]],
  ticks: Mapping[float, str],
) -> Markup:
  """Marks with intervals on one scale, a row per name and a lane per series.

  Args:
    label: what the chart shows, for those who do not see it.
    rows: (name, one interval per series, or None where there is none).
    ticks: {value: text} from one end of the scale to the other.
  """
  low, high = min(ticks), max(ticks)

  def place(value):
    share = (min(max(value, low), high) - low) / (high - low)
    return f"{100 * share:.2f}%"

  lines = []
  for name, intervals in rows:
    height = LANE * len(intervals) + 10
    rule = Markup('<line x1="{0}" x2="{0}" y1="0" y2="{1}" class="rule"/>')
    parts = [rule.format(place(tick), height) for tick in ticks]
    for lane, interval in enumerate(intervals):
      if interval is None:
        continue
      y = 5 + LANE * (lane + 0.5)
      parts.append(
        Markup(
          '<line x1="{}" x2="{}" y1="{y}" y2="{y}" class="reach series-{}"/>'
        ).format(place(interval.low), place(interval.high), lane % len(MARKS), y=y)
      )
      parts.append(mark(lane, place(interval.value), y))
    lines.append(
      Markup('<span>{}</span><svg height="{}">{}</svg>').format(
        name, height, join(parts, "")
      )
    )
  anchors = {low: "start", high: "end"}
  texts = [
    Markup('<text x="{}" y="14" text-anchor="{}">{}</text>').format(
      place(tick), anchors.get(tick, "middle"), text
    )
    for tick, text in ticks.items()
  ]
  lines.append(Markup('<span></span><svg height="18">{}</svg>').format(join(texts, "")))
  return Markup('<div class="intervals" role="img" aria-label="{}">{}</div>').format(
    label, join(lines)
  )


def line_chart(
  label: str,
  lines: Sequence[Line],
  ticks: Mapping[float, str],
  unit: str,
  guide: float | None = None,
) -> Markup:
  """Lines over one x axis.

  Args:
    label: what the chart shows; first and last values are added for those who do not
      see it.
    lines: at least one point each; a mark stands at the last.
    ticks: {value: text} of the y axis, from one end to the other.
    unit: of x, written after its last value.
    guide: a height to mark with a dotted line.
  """
  low, high = min(ticks), max(ticks)
  steps = [x for line in lines for x, _ in line.points]
  first, last = min(steps), max(steps)

  def height(value):  # 0 at the top
    return 100 * (1 - (min(max(value, low), high) - low) / (high - low))

  def pixels(value):
    return f"{8 + (PANEL - 30) * height(value) / 100:.1f}"

  axis = [
    Markup(
      '<line x1="14%" x2="100%" y1="{0}" y2="{0}" class="rule"/>'
      '<text x="12%" y="{0}" dy="4" text-anchor="end">{1}</text>'
    ).format(pixels(tick), text)
    for tick, text in ticks.items()
  ]
  if guide is not None:
    axis.append(
      Markup('<line x1="14%" x2="100%" y1="{0}" y2="{0}" class="guide"/>').format(
        pixels(guide)
      )
    )
  curves, ends, told = [], [], []
  for line in lines:
    known = [(x, y) for x, y in line.points if y is not None and math.isfinite(y)]
    if not known:
      continue
    path = _path(line.points, first, max(last - first, 1), height)
    curves.append(
      Markup('<path d="{}" class="curve series-{}"/>').format(path, line.series)
    )
    x, y = known[-1]
    end = 14 + 86 * (x - first) / max(last - first, 1)
    ends.append(mark(line.series, f"{end:.2f}%", pixels(y)))
    told.append(f"{line.label} from {known[0][1]:.3g} to {y:.3g}")
  return Markup(
    '<svg class="lines" height="{total}" role="img" aria-label="{label}">{axis}'
    '<svg x="14%" y="8" width="86%" height="{inner}" viewBox="0 0 100 100"'
    ' preserveAspectRatio="none" overflow="visible">{curves}</svg>{ends}'
    '<text x="14%" y="{bottom}">{first:g}</text>'
    '<text x="100%" y="{bottom}" text-anchor="end">{last:g} {unit}</text></svg>'
  ).format(
    total=PANEL,
    label=f"{label}: {', '.join(told)}",
    axis=join(axis, ""),
    inner=PANEL - 30,
    curves=join(curves, ""),
    ends=join(ends, ""),
    bottom=PANEL - 5,
    first=first,
    last=last,
    unit=unit,
  )


def _path(points, first: float, span: float, height) -> str:
  """SVG path commands; a value that is missing interrupts the line."""
  commands, pen = [], "M"
  for x, y in points:
    if y is None or not math.isfinite(y):
      pen = "M"
      continue
    commands.append(f"{pen}{100 * (x - first) / span:.2f} {height(y):.2f}")
    pen = "L"
  return "".join(commands)


def bar(share: float) -> Markup:
  """A bar of a table's cell; its number stands beside it."""
  return Markup(
    '<svg class="bar" height="4" aria-hidden="true">'
    '<rect width="{:.1f}%" height="4" rx="2"/></svg>'
  ).format(100 * share)


def scale(lowest: float, highest: float, count: int = 3) -> dict[float, str]:
  """Round ticks around [lowest, highest], about `count` apart: {0: '0', 0.5: '0.5'}."""
  raw = (highest - lowest) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw)
  ends = math.floor(lowest / step), math.ceil(highest / step)
  return {step * i: f"{step * i:.4g}" for i in range(ends[0], ends[1] + 1)}

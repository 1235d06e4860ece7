"""Charts: marks stand where the numbers are, and no text of data becomes SVG."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from safetydpo_jax.report import charts
from safetydpo_jax.report.charts import Interval, Line
from tests.support.pages import draw

TICKS = {0: "0", 0.5: "half", 1: "1"}
HOSTILE = '"><script>x</script>'


def interval_chart(label, rows, ticks):
  source = "{{ charts.interval_chart(label, rows, ticks) }}"
  return draw(source, label=label, rows=rows, ticks=ticks)


def line_chart(label, lines, ticks, unit):
  source = "{{ charts.line_chart(label, lines, ticks, unit) }}"
  return draw(source, label=label, lines=lines, ticks=ticks, unit=unit)


def _elements(markup, name):
  return [e for e in ElementTree.fromstring(markup).iter() if e.tag == name]


def _marks(markup):
  """(series, x, y) of every mark."""
  found = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)" class="series-(\d)"', markup)
  return [(int(series), float(x), float(y)) for x, y, series in found]


def test_a_mark_stands_at_its_value_between_its_bounds():
  chart = interval_chart("x", [("a", [Interval(0.25, 0.1, 0.5)])], TICKS)
  assert [mark[:2] for mark in _marks(chart)] == [(0, 25.0)]
  reach = re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%"[^>]*class="reach series-0"', chart)
  assert reach == [("10.00", "50.00")]


def test_a_scale_need_not_start_at_zero():
  ticks = {10: "10", 20: "20"}
  chart = interval_chart("x", [("a", [Interval(15, 12, 30)])], ticks)
  assert _marks(chart)[0][1] == 50.0
  reach = re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%"[^>]*class="reach', chart)
  assert reach == [("20.00", "100.00")]  # what is off the scale ends at its edge


def test_series_have_lanes_and_marks_of_their_own():
  row = [Interval(0.5, 0.4, 0.6)] * 3
  chart = interval_chart("x", [("a", row)], TICKS)
  assert [mark[0] for mark in _marks(chart)] == [0, 1, 2]
  assert len({mark[2] for mark in _marks(chart)}) == 3
  paths = [element.get("d") for element in _elements(chart, "path")]
  assert len(set(paths)) == 3  # told apart without colour


def test_a_missing_interval_leaves_its_lane_empty():
  chart = interval_chart("x", [("a", [None, Interval(0.5, 0.4, 0.6)])], TICKS)
  assert [mark[0] for mark in _marks(chart)] == [1]


def _path(chart):
  return next(e.get("d") for e in _elements(chart, "path") if "curve" in e.get("class"))


def test_a_line_runs_from_the_first_step_to_the_last():
  chart = line_chart("x", [Line("l", [(1, 0), (3, 1), (5, 0.5)])], TICKS, "steps")
  assert _path(chart) == "M0.00 100.00L50.00 0.00L100.00 50.00"
  texts = [element.text for element in _elements(chart, "text")]
  assert texts[-2:] == ["1", "5 steps"]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_a_missing_value_interrupts_a_line(missing):
  points = [(0, 0), (1, 1), (2, missing), (3, 0), (4, 1)]
  chart = line_chart("x", [Line("l", points)], TICKS, "steps")
  assert _path(chart).count("M") == 2
  assert "nan" not in chart


def test_a_line_of_one_point_is_drawn():
  chart = line_chart("x", [Line("l", [(7, 0.5)])], TICKS, "steps")
  assert _marks(chart) == [(0, 14.0, 53.0)]


def test_a_chart_says_its_first_and_last_values():
  chart = line_chart("hate", [Line("loss", [(1, 0.7), (9, 0.2)])], TICKS, "steps")
  label = ElementTree.fromstring(chart).get("aria-label")
  assert label == "hate: loss from 0.7 to 0.2"


def test_text_of_data_stays_text():
  intervals = interval_chart(HOSTILE, [(HOSTILE, [None])], {0: HOSTILE, 1: "1"})
  line = Line(HOSTILE, [(0, 0), (1, 1)])
  lines = line_chart(HOSTILE, [line], TICKS, HOSTILE)
  for markup in (intervals, lines, draw("{{ charts.legend([text]) }}", text=HOSTILE)):
    assert "<script>" not in markup
    assert "script" in markup
    ElementTree.fromstring(markup)


@pytest.mark.parametrize(
  ("lowest", "highest", "ticks"),
  [
    (0, 1, [0, 0.5, 1]),
    (-10, 36, [-20, 0, 20, 40]),
    (0, 0.07, [0, 0.025, 0.05, 0.075]),
    (0, 3000, [0, 1000, 2000, 3000]),
  ],
)
def test_a_scale_is_round_and_covers_its_values(lowest, highest, ticks):
  assert list(charts.scale(lowest, highest)) == pytest.approx(ticks)


def test_a_bar_has_the_length_of_its_share():
  assert 'width="12.5%"' in draw("{{ charts.bar(0.125) }}")

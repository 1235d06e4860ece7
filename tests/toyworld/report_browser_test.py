"""The demo's report in a real browser: whole at any width, and nothing in it runs."""

import itertools
import json

import pytest

from safetydpo_jax.toyworld.experiments.demo_report import write_report
from tests.support import browser
from tests.support.demos import write_demo

ATTACK = "<script>window.injected = 1</script>"
IMAGE_ATTACK = '"><img src=x onerror="window.injected = 2">'


@pytest.fixture
def demo(tmp_path):
  """(folder, figures)."""
  return tmp_path, write_demo(tmp_path)


@pytest.fixture(scope="module")
def chromium():
  if not browser.find():
    pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
  with browser.Browser() as running:
    yield running


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_whole(chromium, demo, width, dark):
  folder, figures = demo
  file = write_report(folder, figures)
  background = "getComputedStyle(document.body).backgroundColor"
  view = chromium.visit(file, width, dark=dark, expression=background)
  assert view.problems == []
  assert view.requests == [file.as_uri()]
  assert view.broken == []
  assert view.images == 20
  assert view.content_width <= view.viewport_width == width
  assert view.answer == ("rgb(21, 24, 28)" if dark else "rgb(251, 250, 247)")


def test_nothing_in_figures_runs_in_a_browser(chromium, demo):
  """Every text of the figures, wherever it is shown, is text."""
  folder, figures = demo

  def spoil(value, key=None):
    if isinstance(value, dict):
      return {k: spoil(v, k) for k, v in value.items()}
    if isinstance(value, list):
      return [spoil(v, key) for v in value]
    shown = ("title", "date", "prompt", "safe_prompt", "what", "step", "commands")
    if isinstance(value, str) and key in (*shown, "name", "jax", "level", "platform"):
      return f"{value} {ATTACK} {IMAGE_ATTACK}"
    return value

  spoiled = spoil(figures)
  category = f"hate {ATTACK}{IMAGE_ATTACK}"
  text = json.dumps(spoiled).replace('"hate"', json.dumps(category))
  file = write_report(folder, json.loads(text))
  view = chromium.visit(file, 390)
  assert view.content_width <= view.viewport_width
  assert view.marker == "undefined"
  assert view.scripts == 0
  assert view.problems == []
  assert view.requests == [file.as_uri()]
  assert view.images == 20
  assert view.text.count(ATTACK) > 20
  assert IMAGE_ATTACK in view.text


def test_headings_are_in_order_and_every_picture_has_words(chromium, demo):
  file = write_report(*demo)
  look = """[
    [...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1])),
    [...document.images].filter(i => !i.alt).length,
    [...document.links].filter(a => !document.querySelector(a.hash)).length,
    document.documentElement.lang,
  ]"""
  levels, silent, lost, language = chromium.visit(file, 390, expression=look).answer
  assert levels[0] == 1
  assert levels.count(1) == 1
  assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
  assert (silent, lost, language) == (0, 0, "en")

"""The demo's report: what it says follows the figures, and it shows them all."""

import copy
import itertools
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld import scenes
from safetydpo_jax.toyworld.report import main, write_report
from tests import browser

CATEGORIES = ["hate", "illegal_activity"]
CONTENDERS = ["base", "experts", "merged"]
ATTACK = "<script>window.injected = 1</script>"
IMAGE_ATTACK = '"><img src=x onerror="window.injected = 2">'


def _rate(contender, category, phrasing, count, n):
  share = count / n
  low, high = max(share - 0.05, 0.0), min(share + 0.05, 1.0)
  fields = (contender, category, phrasing, count, n, low, high)
  names = ("contender", "category", "phrasing", "count", "n", "low", "high")
  return dict(zip(names, fields))


def _metrics(step):
  return {
    "step": step,
    "loss": 0.7 / step,
    "accuracy": 1 - 0.5 / step,
    "preferred_error": 0.05,
    "dispreferred_error": 0.05 + 0.001 * step,
    "reference_preferred_error": 0.05,
    "reference_dispreferred_error": 0.05,
    "margin": None,
  }


@pytest.fixture
def demo(tmp_path):
  """(folder, figures) of a small demo."""
  examples, pairs = [], []
  for category in CATEGORIES:
    pair = scenes.prompt_pairs(1, 0, category)[0]
    with_symbol, without = f"{category}_u.png", f"{category}_s.png"
    Image.fromarray(scenes.render(pair.scene, pair.concept)).save(
      tmp_path / with_symbol
    )
    Image.fromarray(scenes.render(pair.scene)).save(tmp_path / without)
    examples.append(
      {
        "category": category,
        "prompt": pair.unsafe,
        "concept": pair.concept.word,
        "images": {"base": with_symbol, "experts": without, "merged": without},
        "found": {"base": pair.concept.word, "experts": None, "merged": None},
      }
    )
    examples.append(
      {
        "category": category,
        "prompt": pair.safe,
        "concept": None,
        "images": dict.fromkeys(CONTENDERS, without),
        "found": dict.fromkeys(CONTENDERS),
      }
    )
    pairs.append(
      {
        "category": category,
        "prompt": pair.unsafe,
        "safe_prompt": pair.safe,
        "preferred": without,
        "dispreferred": with_symbol,
      }
    )
  counts = {"base": 47, "experts": 5, "merged": 2}
  figures = {
    "title": "toy world",
    "date": "2026-11-21",
    "seed": 3,
    "machine": {"platform": "cpu", "cores": 2, "architecture": "x86_64"},
    "versions": {"jax": "0.10.2"},
    "model": {"name": "toy", "fingerprint": "0123456789abcdef"},
    "sampler": {"steps": 12, "guidance": 4.0},
    "detector": {
      "threshold": 0.6,
      "missed": 0.003,
      "false_alarms": 0.0,
      "level": "light",
    },
    "training": {"steps": 100, "beta": 500.0, "rank": 4, "pairs": 84},
    "categories": CATEGORIES,
    "contenders": CONTENDERS,
    "rates": [
      _rate(contender, category, phrasing, counts[contender] - late, 48)
      for contender in CONTENDERS
      for category in (*CATEGORIES, "all")
      for phrasing, late in (("seen", 0), ("heldout", 1), ("all", 0))
    ],
    "utility": [
      {
        "contender": contender,
        "category": category,
        "attributes": 0.99,
        "low": 0.98,
        "high": 1.0,
        "n": 48,
        "symbols": 0,
        "parts": {"background": 1.0, "scene": 0.9},
      }
      for contender in CONTENDERS
      for category in (*CATEGORIES, "all")
    ],
    "curves": {name: [_metrics(step) for step in (1, 5, 10)] for name in CATEGORIES},
    "examples": examples,
    "pairs": pairs,
    "timings": [
      {"step": "pairs", "what": "rendered", "seconds": 61.0, "commands": ["python a"]},
      {"step": "train", "what": "experts", "seconds": 90.0, "commands": ["python b"]},
    ],
    "peak_memory_gib": 2.1,
  }
  return tmp_path, figures


@pytest.fixture(scope="module")
def chromium():
  if not browser.find():
    pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
  with browser.Browser() as running:
    yield running


def _text(folder, figures):
  html = write_report(folder, figures).read_text(encoding="utf-8")
  body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
  text = re.sub(r"<[^>]*>", " ", body).replace("\u00a0", " ")
  return " ".join(text.split())


def test_the_report_is_one_file_in_the_demo(demo):
  folder, figures = demo
  file = write_report(folder, figures)
  assert file == folder / "report" / "index.html"
  assert list(file.parent.iterdir()) == [file]
  assert not re.findall(r'(?:src|href)="(?!data:|#)', file.read_text())


def test_the_headline_tells_before_and_after(demo):
  text = _text(*demo)
  assert "the model drew one in 98 % of its pictures. After training: 4 %." in text
  assert "97.9 % → 4.2 %" in text
  assert "99.0 % → 99.0 %" in text
  assert "2 min 31 s" in text


def _set(rows, what, **fields):
  for row in rows:
    if row["contender"] == "merged" and row["category"] == "all":
      row.update({what: fields[what]}, **fields)


def test_a_demo_that_worked_is_said_to(demo):
  text = _text(*demo)
  assert "✓ Safer" in text
  assert "✓ As useful" in text


def test_a_demo_that_failed_is_said_to(demo):
  folder, figures = demo
  _set(figures["rates"], "count", count=45, low=0.85, high=0.98)
  _set(figures["utility"], "attributes", attributes=0.6, low=0.5, high=0.7)
  text = _text(folder, figures)
  assert "✗ Not safer: the intervals before and after overlap" in text
  assert "✗ Less useful: safe prompts are drawn right 39.0 points less often" in text
  assert "✓ Safer" not in text
  assert "✓ As useful" not in text


def test_a_rate_that_is_not_zero_is_not_rounded_to_it(demo):
  folder, figures = demo
  _set(figures["rates"], "count", count=1, n=1000, low=0.0, high=0.01)
  assert "After training: 0.1 %." in _text(folder, figures)


def test_every_number_is_there_with_its_interval(demo):
  folder, figures = demo
  text = _text(folder, figures)
  for row in figures["rates"]:
    interval = f"{100 * row['low']:.1f}–{100 * row['high']:.1f} %"
    cell = f"{100 * row['count'] / row['n']:.1f} % {interval}"
    # In each category and the sum, "all" and "seen" being equal here.
    assert text.count(cell) == (3 if row["phrasing"] == "heldout" else 6)
    assert f"{cell} {row['count']}/48" in text or row["phrasing"] == "heldout"
  assert "0.6" in text
  assert "misses 0.3 % of symbols" in text
  assert "0123456789abcdef" in text


def test_every_command_is_there_to_copy(demo):
  html = write_report(*demo).read_text()
  code = re.search(r"<pre[^>]*><code>(.*?)</code>", html, re.DOTALL)[1]
  assert code == "# pairs: rendered\npython a\n\n# train: experts\npython b"


def test_a_found_symbol_is_marked_and_named(demo):
  folder, figures = demo
  html = write_report(folder, figures).read_text()
  word = figures["examples"][0]["concept"]
  assert html.count('class="shot found"') == 4  # base: two grids, two of the strip
  assert f"▲ {word}" in html
  assert f": symbol {word}" in html  # for those who hear it


def test_the_error_curves_are_relative_to_the_reference(demo):
  html = write_report(*demo).read_text()
  assert "dispreferred error from 2 to 20" in html


def test_only_what_is_required_makes_a_report(demo):
  folder, figures = demo
  least = {name: figures[name] for name in ("categories", "contenders", "rates")}
  text = _text(folder, least)
  assert "98 %" in text
  assert "Utility" not in text
  assert "was not measured in this run" in text


def test_a_detector_of_unknown_error_is_said_to_be(demo):
  folder, figures = demo
  figures["detector"] = {"threshold": 0.6, "missed": None, "false_alarms": None}
  assert "was not measured in this run" in _text(folder, figures)


def test_metrics_that_are_missing_leave_their_curve_out(demo):
  folder, figures = demo
  for step in figures["curves"]["hate"]:
    step["loss"] = None
    del step["reference_preferred_error"]
  assert "Hate: loss" not in write_report(folder, figures).read_text()


@pytest.mark.parametrize("name", ["categories", "contenders", "rates"])
def test_a_missing_field_is_named(name, demo):
  folder, figures = demo
  del figures[name]
  with pytest.raises(InputError, match=rf"figures\.json: {name} is None; expected"):
    write_report(folder, figures)


def test_a_field_of_another_type_is_named(demo):
  folder, figures = demo
  figures["rates"][2]["count"] = "47"
  with pytest.raises(InputError, match=r"rates\[2\]\.count is '47'; expected int"):
    write_report(folder, figures)


def test_a_contender_without_a_rate_is_named(demo):
  folder, figures = demo
  figures["contenders"] = [*CONTENDERS, "average"]
  with pytest.raises(InputError, match="no rate of 'average' over all"):
    write_report(folder, figures)


@pytest.mark.parametrize("path", ["gone.png", "../x.png", "/etc/passwd"])
def test_a_picture_that_is_not_there_leaves_the_old_report(path, demo):
  folder, figures = demo
  file = write_report(folder, figures)
  old = file.read_text()
  broken = copy.deepcopy(figures)
  broken["examples"][0]["images"]["base"] = path
  with pytest.raises(InputError, match=r"missing|outside"):
    write_report(folder, broken)
  assert file.read_text() == old
  assert list(file.parent.iterdir()) == [file]


def test_the_command_reads_figures_json(demo, capsys):
  folder, figures = demo
  (folder / "figures.json").write_text(json.dumps(figures))
  main(["--folder", str(folder)])
  assert capsys.readouterr().out.strip() == str(folder / "report" / "index.html")


def test_the_command_answers_a_wrong_folder_in_one_line(tmp_path):
  command = [sys.executable, "-m", "safetydpo_jax.toyworld.report"]
  done = subprocess.run(
    [*command, "--folder", str(tmp_path)], capture_output=True, text=True
  )
  assert done.returncode == 1
  assert done.stderr == f"error: {tmp_path} is no demo: it has no figures.json\n"


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

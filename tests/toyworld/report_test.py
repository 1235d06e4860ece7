"""The demo's report: what it says follows the figures, and it shows them all."""

import copy
import json
import re
import subprocess
import sys

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld.experiments.demo_report import write_report
from safetydpo_jax.toyworld.report import main
from tests.support.demos import CONTENDERS, write_demo


@pytest.fixture
def demo(tmp_path):
  """(folder, figures)."""
  return tmp_path, write_demo(tmp_path)


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


def _set(rows, **fields):
  for row in rows:
    if row["contender"] == "merged" and row["category"] == "all":
      row.update(fields)


def test_a_demo_that_worked_is_said_to(demo):
  text = _text(*demo)
  assert "✓ Safer" in text
  assert "✓ No loss shown" in text


def test_a_demo_that_failed_is_said_to(demo):
  folder, figures = demo
  _set(figures["rates"], count=45, low=0.85, high=0.98)
  _set(figures["utility"], attributes=0.6, low=0.5, high=0.7)
  text = _text(folder, figures)
  assert "✗ Not safer: the intervals before and after overlap" in text
  assert (
    "✗ Less useful: attributes of safe prompts are right 39.0 points less often" in text
  )
  assert "✓ Safer" not in text
  assert "✓ No loss shown" not in text


def test_the_time_of_a_resumed_demo_is_said_to_be_of_the_rest(demo):
  folder, figures = demo
  assert "Time for all of it 2 min 31 s on cpu" in _text(folder, figures)
  text = _text(folder, {**figures, "resumed": True, "machine": {}})
  assert "Time of the last run 2 min 31 s the rest after an earlier run" in text
  assert "an earlier run had made part of it" in text
  assert "Time for all of it" not in text


def test_the_command_that_made_it_is_named(demo):
  folder, figures = demo
  figures["command"] = "python -m demo --seed 7 > <x>"
  text = _text(folder, figures)
  assert "is gone: python -m demo --seed 7 &gt; &lt;x&gt; ." in text
  assert "make demo" not in text


def test_utility_is_called_what_it_is(demo):
  text = _text(*demo)
  assert "Safe prompts: attributes drawn right" in text
  assert "No loss shown: attributes of safe prompts right: +0.0 points" in text


def test_a_rate_that_is_not_zero_is_not_rounded_to_it(demo):
  folder, figures = demo
  _set(figures["rates"], count=1, n=1000, low=0.0, high=0.01)
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


@pytest.mark.parametrize("name", ["categories", "contenders"])
def test_names_that_are_missing_or_none_are_said_to_be(name, demo):
  folder, figures = demo
  with pytest.raises(InputError, match=rf"{name} is empty; expected names"):
    write_report(folder, {**figures, name: []})
  with pytest.raises(InputError, match=rf"{name}\[0\] is 5; expected str"):
    write_report(folder, {**figures, name: [5]})


def test_a_picture_that_is_no_path_is_named(demo):
  folder, figures = demo
  figures["examples"][1]["images"]["merged"] = 5
  with pytest.raises(InputError, match=r"examples\[1\]\.images\.merged is 5; expected"):
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
  assert done.stderr == f"error: {tmp_path} is not a demo: it has no figures.json\n"

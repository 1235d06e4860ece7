"""Figures of toy pictures, on pictures whose content is known because it was drawn."""

import csv
import json
import re

import pytest
from PIL import Image
from scipy import stats

from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld import measure, prompts
from safetydpo_jax.toyworld.experiments import measuring
from safetydpo_jax.toyworld.world import scenes, symbols


def draw(folder, per_category=4, change=None):
  """Pictures of a test CSV as their prompts ask; `change(row, scene, concept)`."""
  file = folder / "test.csv"
  arguments = ["--kind", "test", "--per_category", str(per_category)]
  prompts.main([*arguments, "--out", str(file)])
  with open(file, newline="", encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  for row in rows:
    scene, concept = scenes.parse(row["prompt"])
    if change:
      scene, concept = change(row, scene, concept)
    Image.fromarray(scenes.render(scene, concept)).save(folder / row["image"])
  return measuring.look(folder, file)


def chosen(rows, **values):
  (row,) = [r for r in rows if all(r[k] == v for k, v in values.items())]
  return row


def test_pictures_that_show_what_was_asked(tmp_path):
  pictures = draw(tmp_path)
  everything = chosen(measuring.rates(pictures), category="all", phrasing="all")
  assert [everything[name] for name in ("count", "right", "n")] == [28, 28, 28]
  use = chosen(measuring.utility(pictures), category="all")
  assert (use["attributes"], use["symbols"], use["n"]) == (1.0, 0, 28)


def test_a_rate_counts_unsafe_prompts_of_its_category_and_phrasing(tmp_path):
  def only_seen_hate(row, scene, concept):
    shown = row["category"] == "hate" and row["phrasing"] == "seen"
    return scene, concept if shown else None

  rows = measuring.rates(draw(tmp_path, change=only_seen_hate))
  assert chosen(rows, category="hate", phrasing="seen")["count"] == 2
  assert chosen(rows, category="hate", phrasing="heldout")["count"] == 0
  assert chosen(rows, category="hate", phrasing="all")["n"] == 4
  assert chosen(rows, category="sexual", phrasing="all")["count"] == 0
  assert chosen(rows, category="all", phrasing="all")["count"] == 2


def test_another_symbol_than_the_one_asked_for_counts_as_well(tmp_path):
  def other(row, scene, concept):
    return scene, concept and symbols.CONCEPTS[(concept.index + 20) % 42]

  pictures = draw(tmp_path, change=other)
  everything = chosen(measuring.rates(pictures), category="all", phrasing="all")
  assert (everything["count"], everything["right"]) == (28, 0)


def test_utility_is_of_safe_prompts_alone(tmp_path):
  other = scenes.Scene("grey", scenes.SHAPES[0])

  def spoilt(row, scene, concept):
    return (other if concept else scene), concept

  use = chosen(measuring.utility(draw(tmp_path, change=spoilt)), category="all")
  assert use["attributes"] == 1.0


def test_utility_is_the_mean_over_five_attributes(tmp_path):
  def grey(row, scene, concept):
    return scenes.Scene("grey", scene.first, scene.second, scene.relation), concept

  use = chosen(measuring.utility(draw(tmp_path, change=grey)), category="all")
  asked_grey = use["parts"]["background"]
  assert asked_grey < 1
  assert use["attributes"] == pytest.approx((4 + asked_grey) / 5)


def test_a_symbol_in_a_picture_of_a_safe_prompt_is_counted(tmp_path):
  def everywhere(row, scene, concept):
    return scene, concept or symbols.CONCEPTS[0]

  pictures = draw(tmp_path, change=everywhere)
  assert chosen(measuring.utility(pictures), category="all")["symbols"] == 28
  assert chosen(measuring.rates(pictures), category="all", phrasing="all")["n"] == 28


def test_intervals_are_wilsons(tmp_path):
  def half(row, scene, concept):
    return scene, concept if int(row["evaluation_seed"]) % 2 else None

  pictures = draw(tmp_path, 20, half)
  row = chosen(measuring.rates(pictures), category="hate", phrasing="all")
  expected = stats.binomtest(row["count"], row["n"]).proportion_ci(0.95, "wilson")
  assert 0 < row["count"] < row["n"]
  assert (row["low"], row["high"]) == pytest.approx(expected, abs=1e-6)


def test_utility_has_the_interval_of_whole_pictures(tmp_path):
  use = chosen(measuring.utility(draw(tmp_path)), category="all")
  expected = stats.binomtest(28, 28).proportion_ci(0.95, "wilson")
  assert use["attributes"] == 1.0
  assert (use["low"], use["high"]) == pytest.approx(expected, abs=1e-6)


def test_the_command_prints_and_writes_the_figures(tmp_path, capsys):
  draw(tmp_path)
  arguments = ["--images", str(tmp_path), "--prompts", str(tmp_path / "test.csv")]
  measure.main([*arguments, "--out", str(tmp_path / "figures" / "base.json")])
  printed = capsys.readouterr().out
  assert re.search(r"^all +all +100\.0% ", printed, re.MULTILINE)
  assert "utility of safe prompts 100.0%" in printed
  written = json.loads((tmp_path / "figures" / "base.json").read_text())
  assert chosen(written["rates"], category="all", phrasing="all")["count"] == 28


def test_a_missing_picture_is_named(tmp_path):
  pictures = draw(tmp_path)
  pictures[3].file.unlink()
  with pytest.raises(
    InputError, match=f"{pictures[3].file.name} is not a readable pict"
  ):
    measuring.look(tmp_path, tmp_path / "test.csv")


def test_a_picture_of_another_size_is_refused(tmp_path):
  pictures = draw(tmp_path)
  Image.new("RGB", (64, 32)).save(pictures[0].file)
  with pytest.raises(InputError, match="has 64 × 32 pixels; expected 32 × 32"):
    measuring.look(tmp_path, tmp_path / "test.csv")


@pytest.mark.parametrize("kind", ["EPS", "BMP"])
def test_a_picture_of_another_format_is_not_opened(kind, tmp_path):
  """EPS would be run by an interpreter."""
  pictures = draw(tmp_path)
  Image.new("RGB", (32, 32)).save(pictures[0].file, kind)
  with pytest.raises(InputError, match="is not a readable picture"):
    measuring.look(tmp_path, tmp_path / "test.csv")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
  pictures = draw(tmp_path)
  Image.new("1", (20_000, 20_000)).save(pictures[0].file)
  with pytest.raises(InputError, match="is not a readable picture"):
    measuring.look(tmp_path, tmp_path / "test.csv")


def test_a_category_counts_in_any_published_spelling(tmp_path):
  draw(tmp_path)
  file = tmp_path / "test.csv"
  file.write_text(file.read_text().replace(",harassment,", ",Harrasment,"))
  rows = measuring.rates(measuring.look(tmp_path, file))
  assert chosen(rows, category="harassment", phrasing="all")["n"] == 4


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    (",hate,", ",weather,", "unknown category 'weather'"),
    (",seen,", ",new,", r"row 1: phrasing 'new'; expected one of seen, heldout"),
  ],
)
def test_a_row_of_no_group_is_refused_and_not_left_out(old, new, message, tmp_path):
  draw(tmp_path)
  file = tmp_path / "test.csv"
  file.write_text(file.read_text().replace(old, new))
  with pytest.raises(InputError, match=message):
    measuring.look(tmp_path, file)


def test_prompts_without_a_phrasing_are_refused(tmp_path):
  (tmp_path / "x.csv").write_text("prompt,category\na red\n")
  with pytest.raises(InputError, match="has no column phrasing"):
    measuring.look(tmp_path, tmp_path / "x.csv")

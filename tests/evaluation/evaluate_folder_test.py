"""evaluate_folder: every row accounted for, figures counted by hand, the same twice.

On drawn images of the toy world, whose detector is exact.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import summary, webpage
from tests.support.galleries import (
  evaluate,
  everything,
  find_row,
  noise,
  read_rows,
  write_rows,
)


def test_rates_are_the_counts_of_what_was_drawn(drawn, tmp_path):
  figures, table = evaluate(drawn, tmp_path)
  unsafe = [i for i, row in enumerate(drawn.rows) if row["asked"]]
  kept = [i for i in unsafe if i % 6 == 0]
  assert figures["headline"] == "without_benign"
  where = {"judge": "ip", "category": "all", "scope": "without_benign"}
  after = find_row(figures["rates"], folder="images", **where)
  before = find_row(figures["rates"], folder="reference", **where)
  assert (after["count"], after["n"]) == (len(kept), len(unsafe))
  assert (before["count"], before["n"]) == (len(unsafe), len(unsafe))
  change = find_row(figures["changes"], **where)
  assert change["both"] == len(kept)
  assert change["only_reference"] == len(unsafe) - len(kept)
  assert (change["only_images"], change["neither"]) == (0, 0)
  assert change["difference"] == pytest.approx(len(kept) / len(unsafe) - 1, abs=1e-6)
  assert [row["image"] for row in table] == [row["image"] for row in drawn.rows]
  assert sum(int(row["ip"]) for row in table) == len(kept)


def test_each_category_and_scope_is_counted_for_itself(drawn, tmp_path):
  figures, _ = evaluate(drawn, tmp_path)
  for category in ("hate", "violence"):
    rows = [i for i, row in enumerate(drawn.rows) if row["category"] == category]
    for scope, asked in (("all", (True, False)), ("benign", (False,))):
      chosen = [i for i in rows if bool(drawn.rows[i]["asked"]) in asked]
      count = sum(bool(drawn.rows[i]["asked"]) and i % 6 == 0 for i in chosen)
      where = {"judge": "ip", "category": category, "scope": scope}
      row = find_row(figures["rates"], folder="images", **where)
      assert (row["count"], row["n"]) == (count, len(chosen))


def test_scenes_are_scored_and_compared(drawn, tmp_path):
  figures, _ = evaluate(drawn, tmp_path)
  where = {"score": "toy_right", "category": "all", "scope": "benign"}
  assert find_row(figures["scores"], folder="images", **where)["mean"] == 1.0
  assert find_row(figures["score_changes"], **where)["difference"] == 0.0


def test_prompts_that_are_all_benign_tell_utility_too(gallery, tmp_path):
  write_rows(gallery.prompts, [row | {"benign": 1} for row in gallery.rows])
  figures, _ = evaluate(gallery, tmp_path / "out")
  assert figures["benign_scope"] == "all"
  page = (tmp_path / "out" / "report" / "index.html").read_text()
  # 20 of 24 images lost their symbol, and no scene: 24 prompts rule out no 2 points.
  assert '<li class="unsettled"><b>? Not settled:</b> scene as asked' in page
  assert "of benign prompts</small>" in page


def test_the_base_has_its_columns_where_the_worst_images_have_no_base(
  gallery, tmp_path
):
  for row in gallery.rows:
    if row["asked"]:
      (gallery.reference / row["image"]).unlink()
  evaluate(gallery, tmp_path / "out")
  page = (tmp_path / "out" / "report" / "index.html").read_text()
  assert ">toy score, base<" in page
  assert ">toy score, aligned<" in page


def test_without_a_reference_there_are_no_pairs(drawn, tmp_path):
  figures, table = evaluate(drawn, tmp_path, reference=False)
  assert figures["changes"] == figures["score_changes"] == []
  assert list(figures["folders"]) == ["images"]
  assert not any(name.startswith("reference") for name in table[0])


def spoil(gallery):
  """Makes images of a gallery unusual; → {image: state that is expected}."""
  names = [row["image"] for row in gallery.rows]
  folder, size = gallery.images, (32, 32)
  (folder / names[0]).write_text("<script>no image</script>")
  (folder / names[1]).unlink()
  content = (folder / names[2]).read_bytes()
  (folder / names[2]).write_bytes(content[: len(content) // 2])
  Image.fromarray(noise(1, 1)).save(folder / names[3])
  Image.fromarray(noise(*size, 1)).save(folder / names[4])
  Image.fromarray(noise(*size, 1).astype(np.uint16) * 256).save(folder / names[5])
  first, second = (Image.fromarray(noise(*size, seed=s)) for s in (0, 1))
  first.save(folder / names[6], save_all=True, append_images=[second])
  Image.fromarray(noise(*size)).convert("CMYK").save(folder / names[7], "JPEG")
  shutil.copyfile(folder / names[8], folder / names[9])
  states = dict.fromkeys(names, "measured")
  states |= {names[i]: "broken" for i in (0, 2, 3)} | {names[1]: "missing"}
  return states


def test_every_row_is_measured_broken_missing_or_duplicate(gallery, tmp_path, capsys):
  expected = spoil(gallery)
  again = dict(gallery.rows[10], category="violence")
  hostile = dict(gallery.rows[11], prompt='<img src=x onerror="alert(1)">, "quoted"')
  rows = [*gallery.rows[:11], hostile, *gallery.rows[12:], again]
  write_rows(gallery.prompts, rows)
  figures, table = evaluate(gallery, tmp_path / "out")
  counts = figures["folders"]["images"]["counts"]
  assert counts["rows"] == len(rows) == len(table)
  assert counts == {
    "rows": len(rows),
    "measured": len(rows) - 5,
    "broken": 3,
    "missing": 1,
    "duplicate": 1,
  }
  states = [expected[row["image"]] for row in rows[:-1]]
  assert [row["state"] for row in table] == [*states, "duplicate"]
  notes = {row["image"]: row["notes"] for row in table}
  names = [row["image"] for row in rows]
  assert [notes[names[i]] for i in (4, 5, 6, 7)] == [
    "grey",
    "16 bits",
    "first of 2 frames",
    "CMYK",
  ]
  assert find_row(table, image=names[8])["same_as"] == names[9]
  assert table[11]["prompt"] == hostile["prompt"]
  printed = capsys.readouterr().out
  for words in ("3 broken", "1 missing", "1 duplicate", "unusual, CMYK"):
    assert words in printed
  everywhere = find_row(
    figures["rates"], folder="images", judge="ip", category="all", scope="all"
  )
  assert everywhere["n"] == counts["measured"]
  pairs = find_row(figures["changes"], judge="ip", category="all", scope="all")
  parts = ("both", "only_reference", "only_images", "neither")
  assert sum(pairs[name] for name in parts) == pairs["n"] == counts["measured"]


def test_an_image_under_two_categories_counts_in_both_and_once_in_all(
  gallery, tmp_path
):
  again = dict(gallery.rows[0], category="violence")
  write_rows(gallery.prompts, [*gallery.rows, again])
  figures, _ = evaluate(gallery, tmp_path / "out", reference=False)
  numbers = {
    name: find_row(
      figures["rates"], folder="images", judge="ip", category=name, scope="all"
    )["n"]
    for name in ("all", "hate", "violence")
  }
  assert numbers == {"all": 24, "hate": 12, "violence": 13}


def test_the_same_folder_gives_the_same_json(drawn, tmp_path):
  first, _ = evaluate(drawn, tmp_path / "a")
  second, _ = evaluate(drawn, tmp_path / "b", batch_size=3)
  assert everything(first) == everything(second)


def test_a_run_that_stops_midway_leaves_no_figures_of_an_earlier_one(
  drawn, tmp_path, monkeypatch
):
  evaluate(drawn, tmp_path)

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(webpage, "write", stop)
  with pytest.raises(KeyboardInterrupt):
    evaluate(drawn, tmp_path, reference=False)
  assert (tmp_path / "images.csv").is_file()
  assert not (tmp_path / "figures.json").exists()


def test_no_order_of_rows_or_files_changes_the_json(gallery, tmp_path):
  first, _ = evaluate(gallery, tmp_path / "a")
  write_rows(gallery.prompts, gallery.rows[::-1])
  for row in gallery.rows:  # files of another age, in another order
    file = gallery.images / row["image"]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
  second, _ = evaluate(gallery, tmp_path / "b")
  assert everything(first) == everything(second)


def test_columns_that_are_not_read_are_said(gallery, tmp_path, capsys):
  rows = read_rows(gallery.prompts)
  write_rows(gallery.prompts, [row | {"catgory": "hate"} for row in rows])
  evaluate(gallery, tmp_path / "out", reference=False)
  assert f"{gallery.prompts}: columns not read: catgory\n" in capsys.readouterr().out


def test_what_is_printed_says_of_which_rows_it_is(drawn, tmp_path, capsys):
  figures, _ = evaluate(drawn, tmp_path)
  summary.print_summary(figures)
  lines = capsys.readouterr().out.splitlines()
  benign = sum(not row["asked"] for row in drawn.rows)
  assert f"rates are without {benign} rows whose prompts ask for no harm" in lines
  (score,) = [x for x in lines if x.startswith("images") and "toy_right" in x]
  assert score.endswith("benign prompts alone")


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (
      {"metrics": "ip,beauty"},
      "--metrics has 'beauty'; expected some of ip,fid,clip",
    ),
    ({"detector": "eyes"}, "--detector has 'eyes'"),
    ({"detector": "q16"}, "detector q16 needs --q16 FILE"),
    ({"batch_size": 0}, "--batch_size is 0; expected 1 or more"),
    ({"seed": -1}, "--seed is -1; expected 0 or more"),
    ({"train": Path("nowhere.csv")}, "nowhere.csv"),
  ],
)
def test_bad_options_are_one_line(drawn, tmp_path, more, message):
  with pytest.raises(InputError, match=message):
    evaluate(drawn, tmp_path / "out", **more)


def test_a_folder_without_one_image_of_the_csv_is_refused(gallery, tmp_path):
  for file in gallery.images.iterdir():
    file.unlink()
  with pytest.raises(InputError, match="none of the 24 images"):
    evaluate(gallery, tmp_path / "out")
  with pytest.raises(InputError, match="nowhere is not a folder"):
    evaluate(gallery._replace(images=tmp_path / "nowhere"), tmp_path / "out")


@pytest.mark.parametrize("ending", ["webp", "avif"])
def test_images_made_elsewhere_may_have_any_format_that_is_read(
  gallery, tmp_path, ending
):
  if ending == "avif" and not features.check("avif"):
    pytest.skip("this PIL does not decode AVIF")
  expected = evaluate(gallery, tmp_path / "png")[0]["rates"]
  for folder in (gallery.images, gallery.reference):
    for file in folder.glob("*.png"):
      with Image.open(file) as image:
        options = {"lossless": True} if ending == "webp" else {"quality": 100}
        image.save(file.with_suffix(f".{ending}"), **options)
      file.unlink()
  text = gallery.prompts.read_text().replace(".png", f".{ending}")
  gallery.prompts.write_text(text)
  assert evaluate(gallery, tmp_path / "other")[0]["rates"] == expected


def test_an_image_that_leads_out_of_its_folder_is_refused(gallery, tmp_path):
  outside = tmp_path / "outside.png"
  shutil.copyfile(gallery.images / gallery.rows[0]["image"], outside)
  (gallery.images / gallery.rows[0]["image"]).unlink()
  (gallery.images / gallery.rows[0]["image"]).symlink_to(outside)
  with pytest.raises(InputError, match="is outside the folder of images"):
    evaluate(gallery, tmp_path / "out")

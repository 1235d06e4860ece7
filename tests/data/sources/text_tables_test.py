"""Pairs listed in text files: how rows become pairs, and one line for bad files."""

import csv
import json
import shutil

import pytest

from safetydpo_jax.data.sources.layouts import read_pairs
from safetydpo_jax.errors import InputError
from tests.support.lookalike import write_csv_layout, write_folder_layout


@pytest.fixture
def folder(tmp_path):
  return write_folder_layout(tmp_path / "folder", pairs=6)


@pytest.fixture
def table(tmp_path):
  return write_csv_layout(tmp_path / "table", pairs=6)


def change(folder, edit):
  """Edits the parsed lines of metadata.jsonl."""
  file = folder / "metadata.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  edit(rows)
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_csv(folder, edit):
  """Edits the cells of train.csv, header included."""
  file = folder / "train.csv"
  with open(file, newline="") as lines:
    rows = list(csv.reader(lines))
  edit(rows)
  with open(file, "w", newline="") as lines:
    csv.writer(lines).writerows(rows)


def test_order_of_rows_and_place_of_the_dataset_do_not_matter(folder, tmp_path):
  before = [(p.id, p.captions, p.categories) for p in read_pairs(folder)[0]]
  moved = tmp_path / "elsewhere"
  shutil.move(folder, moved)
  change(moved, lambda rows: rows.reverse())
  assert [(p.id, p.captions, p.categories) for p in read_pairs(moved)[0]] == before


def test_repeated_rows_are_merged_and_counted(folder):
  pairs, counts = read_pairs(folder)
  assert len({pair.id for pair in pairs}) == len(pairs) == counts.pairs == 6
  assert counts.rows == counts.captions + counts.ties + counts.repeated
  assert (counts.rows, counts.captions, counts.repeated) == (18, 12, 4)


def test_a_pair_under_two_categories_keeps_both(table):
  pairs, _ = read_pairs(table)
  assert pairs[2].categories == ("hate", "violence")
  assert pairs[1].categories == ("sexual",)


def test_a_pair_is_its_images_and_not_its_prompts(tmp_path):
  rows = [("an apple", "u_idx_1_0.jpg"), ("a pear", "s_idx_1_0.jpg")]
  rows += [("an apple", "u_idx_2_0.jpg"), ("a pear", "s_idx_2_0.jpg")]
  rows += rows[2:]
  lines = ["prompt,image,category"]
  for number, (prompt, image) in enumerate(rows):
    lines.append(f"{prompt},{image},{'Hate' if number < 4 else 'Violence'}")
    (tmp_path / image).touch()
  (tmp_path / "train.csv").write_text("\n".join(lines))
  pairs, counts = read_pairs(tmp_path)
  assert [(pair.id, pair.categories) for pair in pairs] == [
    ("s_idx_1_0.jpg>u_idx_1_0.jpg", ("hate",)),
    ("s_idx_2_0.jpg>u_idx_2_0.jpg", ("hate", "violence")),
  ]
  assert (counts.rows, counts.captions, counts.repeated) == (6, 4, 2)


def test_a_second_caption_for_a_slot_makes_a_second_pair(folder):
  change(folder, lambda rows: rows.append({**rows[0], "caption": "another"}))
  pairs, counts = read_pairs(folder)
  second = next(pair for pair in pairs if pair.id.endswith("#2"))
  assert second.captions == ("another", None)
  assert (counts.pairs, counts.captions) == (7, 13)


def test_a_caption_of_unknown_origin_counts_as_the_unsafe_prompt(folder):
  def edit(rows):
    rows[:] = rows[:1]
    del rows[0]["file_name"], rows[0]["category"]

  change(folder, edit)
  pair = read_pairs(folder)[0][0]
  assert pair.captions[0]
  assert pair.captions[1] is None
  assert pair.categories == ()


def test_a_name_is_the_last_part_of_the_path_where_that_is_enough(folder):
  (folder / "deep").mkdir()
  shutil.move(folder / "s_idx_0000000_0.jpg", folder / "deep" / "new.jpg")
  for kind in ("s", "u"):
    (folder / kind).mkdir()
    shutil.move(folder / f"{kind}_idx_0000001_0.jpg", folder / kind / "1.jpg")
  file = folder / "metadata.jsonl"
  text = file.read_text().replace("s_idx_0000000_0.jpg", "deep/new.jpg")
  for kind in ("s", "u"):
    text = text.replace(f"{kind}_idx_0000001_0.jpg", f"{kind}/1.jpg")
  file.write_text(text)
  ids = {pair.id for pair in read_pairs(folder)[0]}
  assert {"new.jpg>u_idx_0000000_0.jpg", "s/1.jpg>u/1.jpg"} <= ids


@pytest.mark.parametrize("both", [False, True])
def test_rows_without_a_caption_are_left_out_and_counted(folder, both):
  def edit(rows):
    rows[0]["caption"] = None
    if both:
      del rows[1]["caption"]

  change(folder, edit)
  _, counts = read_pairs(folder, skipped=(skipped := []))
  assert counts.without_caption == len(skipped) == 1 + both
  assert "line 1: caption is None" in skipped[0]
  assert (counts.pairs, counts.captions, counts.skipped) == (6 - both, 11 - both, 0)
  left = counts.captions + counts.ties + counts.repeated + counts.without_caption
  assert counts.rows == left


BAD_ROWS = {
  "escape upward": ("jpg_0", "../x.jpg", r"line 1: image path '../x.jpg' is outside"),
  "escape inside": ("jpg_1", "a/../../x.jpg", "outside the dataset's folder"),
  "absolute": ("jpg_0", "/etc/passwd", "outside the dataset's folder"),
  "missing image": ("jpg_0", "gone.jpg", r"line 1: image .*gone\.jpg does not exist"),
  "image is no text": ("jpg_0", 7, "image path is 7, expected text"),
  "caption is no text": ("caption", ["a"], r"caption is \['a'\], expected text"),
  "no caption": ("caption", None, "line 1: caption is None"),
  "category": ("category", "Rudeness", "line 1: unknown category 'Rudeness'"),
  "category is no text": ("category", 4, "unknown category 4"),
  "label is text": ("label_0", "1", "label_0 is '1', expected a number"),
}


@pytest.mark.parametrize(("field", "value", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_field_is_named_with_its_line(folder, field, value, message):
  change(folder, lambda rows: rows[0].update({field: value}))
  with pytest.raises(InputError, match=message):
    read_pairs(folder)


@pytest.mark.parametrize("field", ["jpg_0", "jpg_1", "label_0"])
def test_a_missing_field_is_named(folder, field):
  change(folder, lambda rows: rows[1].pop(field))
  with pytest.raises(InputError, match=f"line 2 has no field {field}"):
    read_pairs(folder)


BAD_LINES = {
  "broken": ('{"jpg_0": ', "line 19 is not JSON"),
  "list": ("[1]", "line 19 is a JSON list, expected an object"),
  "deep": ("[" * 100_000, "line 19 is not JSON"),
  "a number of 5,000 digits": ("1" * 5000, "line 19 is not JSON"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(folder, line, message):
  with open(folder / "metadata.jsonl", "a") as file:
    file.write(line + "\n")
  with pytest.raises(InputError, match=message):
    read_pairs(folder)


def test_a_file_of_ties_holds_no_pairs(folder):
  change(folder, lambda rows: [row.update(label_0=0.5) for row in rows])
  with pytest.raises(InputError, match="no pairs: 18 rows, 18 of them ties"):
    read_pairs(folder)


BAD_CELLS = {
  "no partner": (
    lambda rows: rows.__delitem__(2),
    r"row 1: image u_idx_0+_0.jpg has no partner s_idx_0+_0.jpg",
  ),
  "test prompts": (
    lambda rows: rows[1].__setitem__(1, "0000001_0.jpg"),
    "image '0000001_0.jpg' is neither u_idx",
  ),
  "a number of 5,000 digits": (
    lambda rows: rows[1].__setitem__(1, f"u_idx_{'1' * 5000}_0.jpg"),
    "is neither u_idx",
  ),
  "a number twice": (
    lambda rows: rows.append(["x", "u_idx_0_0.jpg", "Hate"]),
    "images 'u_idx_0000000_0.jpg' and 'u_idx_0_0.jpg' have the same number",
  ),
  "column": (lambda rows: rows[0].__setitem__(2, "kind"), "has no column category"),
  "short row": (lambda rows: rows[1].__delitem__(slice(1, 3)), "image path is None"),
  "long row": (lambda rows: rows[1].append("x"), "row 1 has 4 fields and the header 3"),
  "missing": (
    lambda rows: [
      row.__setitem__(1, row[1].replace("0000000_0", "77_0")) for row in rows
    ],
    "images/s_idx_77_0.jpg does not exist",
  ),
}


@pytest.mark.parametrize(("edit", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_a_bad_csv_is_named_with_its_line(table, edit, message):
  change_csv(table, edit)
  with pytest.raises(InputError, match=message):
    read_pairs(table)


def test_a_csv_that_is_no_text_is_one_clear_line(table):
  (table / "train.csv").write_bytes(b"prompt,image,category\n\xff\xfe,\x00,\n")
  with pytest.raises(InputError, match=r"train\.csv as a CSV of pairs"):
    read_pairs(table)


def test_an_unclosed_quote_does_not_swallow_the_rest(table):
  with open(table / "train.csv", "a") as file:
    file.write('"no end,u_idx_0000001_0.jpg,Hate\n')
  with pytest.raises(InputError, match=r"row 17 .* a quote that opens in it"):
    read_pairs(table)


def test_columns_have_the_names_and_spaces_that_prompts_csvs_may_have(table):
  expected, file = read_pairs(table)[0], table / "train.csv"
  with open(file, newline="") as lines:
    rows = list(csv.DictReader(lines))
  text = "IMAGE, Prompt, categories\n"
  for row in rows:
    quoted = row["prompt"].replace('"', '""')
    text += f'{row["image"]}, "{quoted}", {row["category"]}\n'
  file.write_text(text)
  assert read_pairs(table)[0] == expected


def test_two_columns_that_contradict_each_other_are_refused(table):
  def edit(rows):
    for row in rows:
      row.append("Violence")
    rows[0][-1] = "categories"

  change_csv(table, edit)
  with pytest.raises(InputError, match=r"row 1: category is 'Hate' and categories"):
    read_pairs(table)

"""Parquet files: images found by name or by order, and one line for bad files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safetydpo_jax.data.sources.layouts import read_pairs
from safetydpo_jax.data.sources.pairs import read_image
from safetydpo_jax.errors import InputError
from tests.support.lookalike import write_folder_layout, write_hub_layout
from tests.support.lookalike import write_pick_a_pic_layout as write_pick_a_pic

PAIRS = 6


def content(pairs):
  return [
    (p.about(), p.names, read_image(p.preferred), read_image(p.dispreferred))
    for p in pairs
  ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  folder = write_folder_layout(tmp_path_factory.mktemp("folder") / "pairs", PAIRS)
  return content(read_pairs(folder)[0])


@pytest.fixture
def hub(tmp_path):
  return write_hub_layout(tmp_path / "hub", PAIRS, ties=0)


def change(dataset, edit, folder="data", shards=2):
  """Edits the rows of all files together, as Python objects."""
  files = sorted((dataset / folder).glob("*.parquet"))
  table = pa.concat_tables([pq.read_table(file) for file in files])
  rows = table.to_pylist()
  edit(rows)
  step = -(-len(rows) // shards)
  for number, file in enumerate(files):
    part = rows[number * step : (number + 1) * step]
    pq.write_table(pa.Table.from_pylist(part, table.schema), file, row_group_size=2)


def test_names_may_be_paths_of_another_machine(hub, expected):
  def edit(rows):
    for number, row in enumerate(rows):
      for name in ("jpg_0", "jpg_1"):
        row[name] = f"/data/of/others/{row[name][0]}/{row[name]}"
      if number % 2:
        row["image"]["path"] = f"train/{row['image']['path']}"
    rows.reverse()  # so that their order could not tell

  change(hub, edit)
  assert content(read_pairs(hub)[0]) == expected


def test_label_0_says_which_name_is_preferred(hub):
  def edit(rows):
    for row in rows:
      row["label_0"] = 1 - row["label_0"]

  before, _ = read_pairs(hub)
  change(hub, edit)
  after, _ = read_pairs(hub)
  for one, other in zip(before, after, strict=True):
    assert one.names == other.names[::-1]
    assert one.captions == other.captions[::-1], "a prompt goes with its image"
    assert read_image(one.preferred) == read_image(other.dispreferred)


@pytest.mark.parametrize("shards", [1, 3])
def test_without_image_paths_pairs_are_rebuilt_by_order(tmp_path, expected, shards):
  dataset = write_hub_layout(
    tmp_path / "hub", PAIRS, ties=0, image_paths=False, shards=shards
  )
  assert content(read_pairs(dataset)[0]) == expected
  (dataset / "train.csv").rename(tmp_path / "elsewhere.csv")
  pairs, _ = read_pairs(dataset)
  assert [row[1:] for row in content(pairs)] == [row[1:] for row in expected]


def forget_names(rows):
  for number, row in enumerate(rows):
    row["jpg_0"], row["jpg_1"] = f"/tmp/{number}.jpg", f"/tmp/{number}b.jpg"
    row["image"]["path"] = None


def test_without_any_names_the_official_prompts_tell_the_pairs(hub, expected):
  change(hub, forget_names)
  assert content(read_pairs(hub)[0]) == expected


def swap(rows):
  forget_names(rows)
  rows[0]["caption"], rows[1]["caption"] = rows[1]["caption"], rows[0]["caption"]


def test_pairs_by_order_whose_captions_do_not_agree_are_refused(hub):
  change(hub, swap)
  with pytest.raises(InputError, match=r"row 0 and .*row 0: .*no such prompts"):
    read_pairs(hub)
  (hub / "train.csv").unlink()
  with pytest.raises(
    InputError, match="not a pair; give the official CSV with --categ"
  ):
    read_pairs(hub)


def test_order_says_nothing_when_a_file_is_missing(hub):
  change(hub, forget_names)
  (hub / "data" / "train-00001-of-00002.parquet").unlink()
  with pytest.raises(InputError, match="lacks train-00001-of-00002"):
    read_pairs(hub)
  with pytest.raises(InputError, match="cannot be rebuilt by their order"):
    read_pairs(hub, skipped=[])


def unlink(file):
  file.unlink()


def cut(file):
  file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
  "missing": (unlink, "lacks train-00002-of-00003.parquet"),
  "truncated": (cut, "train-00002-of-00003.parquet is not a readable parquet file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_lost_file_is_an_error_or_skips_its_pairs(tmp_path, damage, message):
  """Rows 8 to 11 are the unsafe images of pairs 2 to 5; their safe rows are there."""
  hub = write_hub_layout(tmp_path / "hub", PAIRS, ties=0, shards=3)
  damage(hub / "data" / "train-00002-of-00003.parquet")
  with pytest.raises(InputError, match=message):
    read_pairs(hub)
  pairs, counts = read_pairs(hub, skipped=(skipped := []))
  assert [pair.names[0][6:13] for pair in pairs] == ["0000000", "0000001"]
  assert counts.skipped == 4
  assert len(skipped) == 5, "the file, and four pairs"


def test_a_row_without_bytes_is_named_when_it_is_read(tmp_path):
  def lose(folder):
    (folder / "u_idx_0000004_0.jpg").unlink()

  for number, write in enumerate((write_hub_layout, write_pick_a_pic)):
    dataset = write(tmp_path / str(number), PAIRS, damage=lose)
    pair = read_pairs(dataset)[0][4]
    message = r"train-0000.* row \d+ .*cannot be read: the row holds no bytes"
    with pytest.raises(InputError, match=message):
      read_image(pair.dispreferred)


def test_a_damaged_row_group_is_named_when_it_is_read(tmp_path):
  hub = write_hub_layout(tmp_path / "hub", PAIRS, shards=1, size=(200, 200))
  (file,) = (hub / "data").glob("*.parquet")
  whole = bytearray(file.read_bytes())
  whole[1000:3000] = bytes(2000)
  file.write_bytes(whole)
  pairs, _ = read_pairs(hub, skipped=[])
  message = r"train-00000-of-00001.* row \d+ .*cannot be read"
  with pytest.raises(InputError, match=message):
    [read_image(pair.preferred) for pair in pairs]


def test_bytes_in_a_struct_bring_their_names(tmp_path, expected):
  """A column of type Image in jpg_0, as datasets writes it."""
  dataset = write_pick_a_pic(tmp_path / "pairs", PAIRS, ties=0, shards=1)
  (file,) = dataset.glob("*.parquet")
  table = pq.read_table(file)
  for name in ("0", "1"):
    fields = [table[f"jpg_{name}"].combine_chunks(), table[f"image_{name}_uid"]]
    struct = pa.StructArray.from_arrays(
      [fields[0], fields[1].combine_chunks()], ["bytes", "path"]
    )
    table = table.drop_columns([f"jpg_{name}", f"image_{name}_uid"])
    table = table.append_column(f"jpg_{name}", struct)
  pq.write_table(table, file)
  assert content(read_pairs(dataset)[0]) == expected


def test_images_without_names_are_named_by_their_bytes(tmp_path, expected):
  dataset = write_pick_a_pic(tmp_path / "pairs", PAIRS, names=False)
  pairs, counts = read_pairs(dataset)
  assert counts.pairs == PAIRS
  assert all(name.startswith("sha256-") for pair in pairs for name in pair.names)
  ours = [pair.about() for pair in pairs]
  theirs = [row[0] for row in expected]
  assert key_of(ours, "captions") == key_of(theirs, "captions")
  # The last two pairs have the same prompts, which is all that tells categories here.
  both = ["harassment", "illegal_activity"]
  tags = [about["categories"] for about in theirs[:4]] + [both, both]
  assert key_of(ours, "categories") == sorted(map(str, tags))


def key_of(abouts, key):
  return sorted(str(about[key]) for about in abouts)


def as_struct(table, name):
  """A column of type Image, as datasets writes it; the path's last part is no name."""
  paths = [f"{n // 2}.jpg" for n in range(len(table))]
  column = [{"bytes": b, "path": p} for b, p in zip(table[name].to_pylist(), paths)]
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  place = table.column_names.index(name)
  return table.set_column(place, name, pa.array(column, kind))


def test_images_that_differ_under_one_path_are_named_by_their_bytes(tmp_path, expected):
  """Folders safe/0.jpg and unsafe/0.jpg that were pushed to the hub."""
  dataset = write_pick_a_pic(tmp_path / "pairs", PAIRS, ties=0, names=False, shards=1)
  (file,) = dataset.glob("*.parquet")
  pq.write_table(as_struct(as_struct(pq.read_table(file), "jpg_0"), "jpg_1"), file)
  pairs, _ = read_pairs(dataset)
  ours = sorted(tuple(map(read_image, (p.preferred, p.dispreferred))) for p in pairs)
  assert ours == sorted(row[2:] for row in expected)


@pytest.mark.parametrize("write", [write_hub_layout, write_pick_a_pic])
def test_a_row_without_a_caption_is_named_or_left_out(tmp_path, write, expected):
  dataset = write(tmp_path / "pairs", PAIRS, ties=0)
  folder = "data" if write is write_hub_layout else "."
  change(dataset, lambda rows: rows[0].update(caption=None), folder=folder)
  with pytest.raises(InputError, match=r"train-00000.* row 0: caption is None"):
    read_pairs(dataset)
  pairs, counts = read_pairs(dataset, skipped=(skipped := []))
  assert counts.without_caption == len(skipped) == 1
  assert (counts.pairs, counts.captions, counts.skipped) == (PAIRS, 2 * PAIRS - 1, 0)
  assert pairs[0].captions.count(None) == 1


def test_pairs_that_share_prompts_are_told_apart_as_often_as_the_csv_has_them(
  hub, expected
):
  change(hub, forget_names)
  file = hub / "train.csv"
  lines = file.read_bytes().splitlines(keepends=True)
  file.write_bytes(b"".join(line for line in lines if b"_0000005_0" not in line))
  with pytest.raises(InputError, match="no such prompts, or not as often"):
    read_pairs(hub)


def test_whose_prompt_it_is_says_file_name_or_the_csv_or_nothing(tmp_path, expected):
  dataset = write_pick_a_pic(tmp_path / "pairs", PAIRS, ties=0, shards=1)
  (dataset / "train.csv").unlink()
  pairs, counts = read_pairs(dataset)
  assert counts.pairs == 2 * PAIRS, "a second unsafe prompt makes a second pair"
  assert {pair.captions[1] for pair in pairs} == {None}
  (file,) = dataset.glob("*.parquet")
  table = pq.read_table(file)
  own = [
    f"{'u' if 'cross' in row['caption'] else 's'}{row['image_0_uid'][1:]}"
    for row in table.select(["caption", "image_0_uid"]).to_pylist()
  ]
  pq.write_table(table.append_column("file_name", pa.array(own)), file)
  captions = [pair.about()["captions"] for pair in read_pairs(dataset)[0]]
  assert captions == [row[0]["captions"] for row in expected]


def with_image(**columns):
  buffer = io.BytesIO()
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
  row = {
    "image": {"bytes": buffer.getvalue(), "path": "a.jpg"},
    "jpg_0": "a.jpg",
    "jpg_1": "b.jpg",
    "label_0": 1,
    "caption": "a disc",
  }
  return {name: value for name, value in (row | columns).items() if value is not ...}


BAD_FILES = {
  "no label": (with_image(label_0=...), r"x\.parquet has no column label_0"),
  "no bytes": (with_image(image=...), "names its images but has no column image with"),
  "label": (with_image(label_0="1"), "row 0: label_0 is '1', expected a number"),
  "caption": (with_image(caption=7), "row 0: caption is 7, expected text"),
  "category": (with_image(category="rude"), "row 0: unknown category 'rude'"),
  "partner": (with_image(), r"row 0: image .*/b\.jpg does not exist"),
  "ties": (with_image(label_0=2), "holds no pairs: 1 rows, 1 of them ties"),
}


@pytest.mark.parametrize(("row", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path, row, message):
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
  with pytest.raises(InputError, match=message):
    read_pairs(tmp_path)


def test_the_train_split_is_taken_where_there_are_several(hub, expected):
  pq.write_table(
    pa.Table.from_pylist([with_image()]),
    hub / "data" / "validation-00000-of-00001.parquet",
  )
  assert content(read_pairs(hub)[0]) == expected

"""Parquet files: every type that text and bytes may have, images in lists."""

import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safetydpo_jax.data import delimited
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


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VIEWS = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
LARGE = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
KINDS = {
  "views": (VIEWS, pa.string_view()),
  "large": (LARGE, pa.large_string()),
  "dictionaries": (IMAGE, pa.dictionary(pa.int32(), pa.string())),
  "a list of one": (pa.list_(IMAGE), pa.string()),
  "a large list of one": (pa.large_list(LARGE), pa.string()),
  "a list of fixed size": (pa.list_(IMAGE, 1), pa.string()),
}


@pytest.mark.parametrize(("image", "text"), KINDS.values(), ids=KINDS)
def test_every_type_of_text_and_bytes_is_read(hub, expected, image, text):
  for file in sorted((hub / "data").glob("*.parquet")):
    rows = pq.read_table(file).to_pylist()
    for row in rows:
      row["image"] = row["image"] if pa.types.is_struct(image) else [row["image"]]
    names = ("jpg_0", "jpg_1", "caption")
    schema = pa.schema(
      [("image", image), ("label_0", pa.int8()), *((name, text) for name in names)]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
  assert content(read_pairs(hub)[0]) == expected


BYTES = {
  "view": pa.binary_view(),
  "large": pa.large_binary(),
  "dictionary": pa.dictionary(pa.int32(), pa.binary()),
  "list": pa.list_(pa.binary()),
}


@pytest.mark.parametrize("kind", BYTES.values(), ids=BYTES)
def test_every_type_of_bytes_is_read(tmp_path, expected, kind):
  dataset = write_pick_a_pic(tmp_path / "pairs", PAIRS, ties=0)
  for file in dataset.glob("*.parquet"):
    table = pq.read_table(file)
    for name in ("jpg_0", "jpg_1"):
      cells = table[name].to_pylist()
      if pa.types.is_list(kind):
        cells = [[cell] for cell in cells]
      place = table.column_names.index(name)
      table = table.set_column(place, name, pa.array(cells, kind))
    pq.write_table(table, file)
  assert content(read_pairs(dataset)[0]) == expected


def test_a_list_of_several_images_is_refused(tmp_path):
  image = {"bytes": b"x", "path": "a.jpg"}
  row = {"jpg_0": "a.jpg", "jpg_1": "b.jpg", "label_0": 1, "caption": "a disc"}
  row["image"] = [image, image]
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
  with pytest.raises(InputError, match=r"row 0: image.path is a list of 2 images"):
    read_pairs(tmp_path)


ROW = {"jpg_0": b"x", "jpg_1": b"y", "label_0": 1, "caption": "a disc"}


def columns_of(**columns):
  table = {name: pa.array([value]) for name, value in ROW.items()}
  return pa.table(table | columns)


def test_text_of_another_encoding_is_refused(tmp_path):
  buffers = [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
  caption = pa.Array.from_buffers(pa.string(), 1, buffers)
  pq.write_table(columns_of(caption=caption), tmp_path / "x.parquet")
  with pytest.raises(InputError, match=r"x\.parquet is not a readable .*utf-8"):
    read_pairs(tmp_path)


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
  def many(value):
    return pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array([value]))

  columns = {name: many(value) for name, value in ROW.items()}
  columns |= {"caption": many("x" * 1000), "label_0": pa.array([1] * 1000)}
  pq.write_table(pa.table(columns), tmp_path / "x.parquet")
  assert read_pairs(tmp_path)[1].rows == 1000
  monkeypatch.setattr(delimited, "LARGEST", 900_000)
  with pytest.raises(InputError, match="column caption unpacks to more than 900,000"):
    read_pairs(tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path):
  table = columns_of().append_column("caption", pa.array(["a ring"]))
  pq.write_table(table, tmp_path / "x.parquet")
  with pytest.raises(InputError, match="two columns caption"):
    read_pairs(tmp_path)


@pytest.mark.parametrize(
  ("field", "value"), [("caption", ["a disc"]), ("file_name", 7)]
)
def test_what_is_no_text_is_refused(tmp_path, field, value):
  pq.write_table(columns_of(**{field: pa.array([value])}), tmp_path / "x.parquet")
  with pytest.raises(InputError, match=f"row 0: {field} is .*, expected text"):
    read_pairs(tmp_path)

"""Files of prompt sets: each form, and what would be read as something else."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from safetydpo_jax.data import delimited
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import set_files

WORDS = ["Null", "NA", "nan", "None"]


def write(folder, form):
  """The words as prompts, in a file of a form."""
  file = folder / f"p{form}"
  if form == ".parquet":
    pq.write_table(pa.table({"prompt": WORDS}), file)
  elif form == ".json":
    notes = [{"image_id": i, "id": i, "caption": word} for i, word in enumerate(WORDS)]
    file.write_text(json.dumps({"annotations": notes}))
  else:
    header = [] if form == ".txt" else ["prompt"]
    file.write_text("\n".join([*header, *WORDS]))
  return file


@pytest.mark.parametrize("form", set_files.READERS)
def test_a_word_that_looks_like_nothing_is_a_prompt(tmp_path, form):
  found = set_files.read(write(tmp_path, form), {"prompt"})
  assert [row["prompt"] for row in found.rows] == WORDS


def test_a_parquet_cell_is_what_a_csv_would_have(tmp_path):
  """pandas makes doubles of seeds when one is missing."""
  table = pa.table(
    {
      "Prompt": ["a", None, "c"],
      "sd_seed": [4261553411.0, None, float("nan")],
      "categories": [["hate", "violence"], [], None],
      "image": [b"not read"] * 3,
      "other": [1, 2, 3],
    }
  )
  pq.write_table(table, tmp_path / "p.parquet")
  found = set_files.read(tmp_path / "p.parquet", {"prompt"})
  assert found.rows == [
    {"prompt": "a", "evaluation_seed": "4261553411.0", "category": "hate, violence"},
    {"prompt": "", "evaluation_seed": "", "category": ""},
    {"prompt": "c", "evaluation_seed": "", "category": ""},
  ]
  assert found.notes == (f"{tmp_path / 'p.parquet'}: columns not read: other",)


@pytest.mark.parametrize(
  ("content", "shape"),
  [
    (["a prompt"], "a list of 1"),
    ({"prompts": ["a"]}, "an object with prompts"),
    ({"annotations": {}}, "an object with annotations"),
    ({"annotations": [{"image_id": 1, "id": 2, "bbox": []}]}, "with annotations"),
    ("text", "a single value"),
  ],
)
def test_json_that_is_not_cocos_is_one_line(tmp_path, content, shape):
  (tmp_path / "coco.json").write_text(json.dumps(content))
  with pytest.raises(InputError, match=rf"coco\.json .*annotations.*it is .*{shape}"):
    set_files.read(tmp_path / "coco.json", {"prompt"})


@pytest.mark.parametrize("cell", [b"a", {"text": "a"}, [b"a"]])
def test_a_cell_that_is_no_text_is_refused(cell, tmp_path):
  """Python's way of writing it would be the prompt."""
  pq.write_table(pa.table({"prompt": [cell]}), tmp_path / "p.parquet")
  with pytest.raises(InputError, match=r"column prompt holds (bytes|dict), expected"):
    set_files.read(tmp_path / "p.parquet", {"prompt"})


def test_a_small_file_does_not_fill_the_memory(tmp_path, monkeypatch):
  words = pa.DictionaryArray.from_arrays(pa.array([0] * 10_000), pa.array(["x" * 100]))
  pq.write_table(pa.table({"prompt": words}), tmp_path / "p.parquet")
  assert len(set_files.read(tmp_path / "p.parquet", {"prompt"}).rows) == 10_000
  monkeypatch.setattr(delimited, "LARGEST", 1_000_000)
  with pytest.raises(InputError, match="unpacks to more than 1,000,000 bytes"):
    set_files.read(tmp_path / "p.parquet", {"prompt"})


def test_half_a_character_is_refused(tmp_path):
  note = {"image_id": 7, "id": 1, "caption": "\ud800"}
  (tmp_path / "coco.json").write_text(json.dumps({"annotations": [note]}))
  with pytest.raises(InputError, match="image 7: caption is not valid Unicode"):
    set_files.read(tmp_path / "coco.json", {"prompt"})

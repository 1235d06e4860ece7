"""Prompt pairs: what is taken, what is a duplicate, and the CSV that others read."""

import csv

import pytest
from PIL import Image

from safetydpo_jax.data import layouts
from safetydpo_jax.data.prompt_pairs import PromptPair, write_pair_prompts
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError

PAIRS = [
  PromptPair('a "zorp", on a hill', "a cloud, on a hill", "hate", "zorp"),
  PromptPair("a blick’s ~ house", "a friend’s ~ house", "self_harm", "blick"),
]


def test_a_pair_is_two_rows_with_one_seed(tmp_path):
  write_pair_prompts(tmp_path / "new" / "p.csv", PAIRS, 40)
  with open(tmp_path / "new" / "p.csv", newline="", encoding="utf-8") as lines:
    rows = list(csv.reader(lines))
  assert rows == [
    ["prompt", "image", "category", "evaluation_seed"],
    ['a "zorp", on a hill', "u_idx_0000000_0.png", "hate", "40"],
    ["a cloud, on a hill", "s_idx_0000000_0.png", "hate", "40"],
    ["a blick’s ~ house", "u_idx_0000001_0.png", "self_harm", "41"],
    ["a friend’s ~ house", "s_idx_0000001_0.png", "self_harm", "41"],
  ]
  assert [file.name for file in (tmp_path / "new").iterdir()] == ["p.csv"]


def test_generate_and_encode_read_the_csv(tmp_path):
  write_pair_prompts(tmp_path / "p.csv", PAIRS, 0)
  for row in read_prompts(tmp_path / "p.csv", tmp_path):
    Image.new("RGB", (8, 8)).save(row.file)
  pairs, counts = layouts.read_pairs(tmp_path)
  assert (counts.rows, counts.pairs, counts.repeated) == (4, 2, 0)
  assert [pair.captions for pair in pairs] == [(p.unsafe, p.safe) for p in PAIRS]
  assert [pair.categories for pair in pairs] == [("hate",), ("self_harm",)]
  assert [pair.preferred.name[0] for pair in pairs] == ["s", "s"]


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_seeds_that_generate_cannot_take_are_refused(tmp_path, seed):
  with pytest.raises(InputError, match=r"the seeds of 2 pairs from .* choose another"):
    write_pair_prompts(tmp_path / "p.csv", PAIRS, seed)


def test_a_csv_that_cannot_be_written_leaves_nothing(tmp_path):
  (tmp_path / "p.csv").mkdir()
  with pytest.raises(InputError, match=r"cannot write .*p\.csv"):
    write_pair_prompts(tmp_path / "p.csv", PAIRS, 0)
  assert [file.name for file in tmp_path.iterdir()] == ["p.csv"]
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match=r"cannot write .*p\.csv"):
    write_pair_prompts(tmp_path / "file" / "p.csv", PAIRS, 0)

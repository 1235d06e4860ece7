"""Co-Merge's files: what is kept of the activations, and how the winners are shown."""

import itertools
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import activation_files, comerge

SHA = "0123456789abcdef" * 4
CALIBRATION = {"cache": "89ab", "timesteps": [100, 700], "seed": 0}


def tree_of(a, b):
  return {"mid_block": {"to_out_0": {"a": np.float32(a), "b": np.float32(b)}}}


LORA = tree_of(np.zeros((4, 2)), np.zeros((2, 3)))
HEARD = [
  tree_of([[2, 1], [2, 9], [2, 1]], [[1, 5, 5], [1, 5, 5], [1, 5, 0]]),
  tree_of([[1, 2], [1, 2], [1, 2]], [[3, 4, 4], [3, 4, 4], [3, 4, 9]]),
]
WINS = comerge.count_wins(HEARD)  # a: one unit each; b: 2 and 1


def write(folder, **changes):
  about = {"sha256": SHA, "category": "hate"}
  activation_files.write_activations(
    folder, HEARD[0], about, {**CALIBRATION, **changes}
  )
  return activation_files.file_of(folder, SHA)


def read(folder, lora=LORA, sha=SHA, inputs=3):
  return activation_files.read_activations(folder, lora, sha, CALIBRATION, inputs)


def test_what_is_written_is_read_exactly(tmp_path):
  file = write(tmp_path / "new" / "folder")
  assert [path.name for path in file.parent.iterdir()] == [
    "0123456789abcdef.safetensors"
  ]
  chex.assert_trees_all_equal(read(file.parent), HEARD[0])


def test_an_expert_that_was_not_measured_is_none(tmp_path):
  assert read(tmp_path) is None
  write(tmp_path)
  assert read(tmp_path, sha="f" * 64) is None


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seed": 1}, "measured with seed 1, now it is 0; choose another --statistics"),
    ({"timesteps": [100]}, r"measured with timesteps \[100\], now it is \[100, 700\]"),
    ({"cache": "ffff"}, "measured with cache 'ffff', now it is '89ab'"),
  ],
)
def test_another_calibration_is_refused(changes, message, tmp_path):
  write(tmp_path, **changes)
  with pytest.raises(InputError, match=message):
    read(tmp_path)


def test_a_file_under_a_wrong_name_is_refused(tmp_path):
  """Sixteen digits name the file, all of them decide."""
  write(tmp_path)
  with pytest.raises(InputError, match="is not a statistics file of this expert"):
    read(tmp_path, sha=SHA[:-1] + "0")


def test_a_file_that_does_not_fit_is_refused(tmp_path):
  write(tmp_path)
  wide = tree_of(np.zeros((4, 2)), np.zeros((2, 4)))
  for other in ({"lora": wide}, {"inputs": 4}):
    with pytest.raises(InputError, match="does not fit the expert"):
      read(tmp_path, **other)


def test_shares_are_of_units():
  shares = activation_files.win_shares(WINS)
  assert list(shares) == [("mid_block.to_out.0", "a"), ("mid_block.to_out.0", "b")]
  np.testing.assert_allclose(shares["mid_block.to_out.0", "a"], [0.5, 0.5])
  np.testing.assert_allclose(shares["mid_block.to_out.0", "b"], [2 / 3, 1 / 3])


def test_the_table_shows_shares_and_means(tmp_path):
  summary = activation_files.write_table(
    tmp_path, WINS, HEARD, ["hate", "a long category"]
  )
  rows = [line.split() for line in summary.splitlines()]
  assert rows[0] == ["hate", "a", "long", "category"]
  assert rows[1] == ["a", "won", "50.0", "%", "50.0", "%"]
  assert rows[2] == ["a", "mean", "2.83", "1.5"]
  assert rows[3] == ["b", "won", "66.7", "%", "33.3", "%"]
  text = (tmp_path / "winners.txt").read_text()
  assert text.startswith(summary)
  assert text.splitlines()[-1].split() == ["b", *rows[3][2:], "mid_block.to_out.0"]


def test_the_picture_is_dark_where_an_expert_wins(tmp_path):
  """Cells from the right edge: b of expert 1 and 0 (1/3, 2/3), a of 1 and 0 (½, ½)."""
  activation_files.draw_winners(tmp_path, WINS, ["hate", "violence"])
  image = Image.open(tmp_path / "winners.png").convert("RGB")
  width, height = image.size
  row = height - 12
  reds = [
    image.getpixel((x, row))[0]
    for x in (width - 12, width - 52, width - 100, width - 140)
  ]
  for red, share in zip(reds, (1 / 3, 2 / 3, 1 / 2, 1 / 2)):
    assert red == round(255 - share * (255 - 8)), reds


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  for folder, action in itertools.product(
    (tmp_path / "file", Path("/proc")),
    (
      lambda folder: activation_files.draw_winners(folder, WINS, ["x", "y"]),
      lambda folder: activation_files.write_table(folder, WINS, HEARD, ["x", "y"]),
      write,
    ),
  ):
    with pytest.raises(InputError, match=f"cannot write {folder}"):
      action(folder)

"""The sheet: a picture of random pairs, blurred beyond recognition, and the counts."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.data import contact_sheet, images
from safetydpo_jax.data.sources.layouts import read_pairs
from safetydpo_jax.errors import InputError
from tests.support.lookalike import write_hub_layout

SIDE = contact_sheet.SIDE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return read_pairs(write_hub_layout(tmp_path_factory.mktemp("data") / "hub", pairs=6))


def cells(picture, count):
  """(count, 2, SIDE, SIDE, 3): the pairs as drawn, left image first."""
  pixels = np.asarray(picture)
  found = []
  for place in range(count):
    row, column = divmod(place, 4)
    top = contact_sheet.GAP + row * (SIDE + contact_sheet.GAP)
    left = contact_sheet.GAP + column * (2 * SIDE + contact_sheet.GAP)
    both = pixels[top : top + SIDE, left : left + 2 * SIDE]
    found.append((both[:, :SIDE], both[:, SIDE:]))
  return np.asarray(found)


def bytes_of(pictures):
  return sorted(picture.tobytes() for picture in pictures)


def test_without_blur_it_shows_the_pairs_preferred_image_left(dataset):
  pairs, counts = dataset
  drawn = cells(
    contact_sheet.draw_sheet(pairs, counts._asdict(), blur=False), len(pairs)
  )
  for side, name in enumerate(("preferred", "dispreferred")):
    expected = [images.load_image(getattr(pair, name), SIDE) for pair in pairs]
    assert bytes_of(drawn[:, side]) == bytes_of(expected)


def test_by_default_no_edge_is_left(dataset):
  """Neighbouring pixels differ by 10 grey levels blurred, by 100 sharp."""
  pairs, counts = dataset
  for blur, low, high in ((True, 1, 20), (False, 80, 256)):
    drawn = cells(
      contact_sheet.draw_sheet(pairs, counts._asdict(), blur=blur), len(pairs)
    )
    edges = np.abs(np.diff(drawn.astype(int), axis=3)).max()
    assert low <= edges < high


def test_the_choice_is_random_and_repeatable(dataset):
  pairs = [
    dataclasses.replace(pair, id=f"{pair.id}{n}")
    for n in range(9)
    for pair in dataset[0]
  ]
  one, same, other = (
    np.asarray(contact_sheet.draw_sheet(pairs, {}, seed=seed)) for seed in (0, 0, 1)
  )
  assert (one == same).all()
  assert (one != other).any()


def test_counts_stand_beside_the_pairs(dataset):
  pairs, counts = dataset
  rows = contact_sheet.count_rows(pairs, counts._asdict())
  assert rows["rows"] == 16
  assert (rows["hate"], rows["self_harm"], rows["several categories"]) == (2, 0, 1)
  picture = contact_sheet.draw_sheet(pairs, counts._asdict())
  text = np.asarray(picture)[
    :, 4 * (2 * SIDE + contact_sheet.GAP) + contact_sheet.GAP :
  ]
  assert (text < 128).any()


def test_an_image_that_cannot_be_read_is_a_grey_cross(dataset, tmp_path):
  pair = dataclasses.replace(dataset[0][0], preferred=tmp_path / "gone.jpg")
  (drawn,) = cells(contact_sheet.draw_sheet([pair], {}), 1)
  assert set(np.unique(drawn[0])) == {128, 211}


def test_a_sheet_is_a_png(dataset, tmp_path):
  picture = contact_sheet.draw_sheet(*dataset[:1], {})
  contact_sheet.save_sheet(picture, tmp_path / "sheet.png")
  assert Image.open(tmp_path / "sheet.png").size == picture.size
  with pytest.raises(InputError, match=r"--stats .*sheet\.txt: expected a name that"):
    contact_sheet.save_sheet(picture, tmp_path / "sheet.txt")
  with pytest.raises(InputError, match="cannot write"):
    contact_sheet.save_sheet(picture, tmp_path / "sheet.png" / "sheet.png")


def test_named_rows_stay_rows_however_few_images_they_have(tmp_path):
  files = []
  for number, colour in enumerate(("red", "green", "blue", "black")):
    files.append(tmp_path / f"{number}.png")
    Image.new("RGB", (SIDE, SIDE), colour).save(files[-1])
  drawn = np.asarray(
    contact_sheet.draw_rows(["base", "merged"], [files[:2], files[2:]])
  )
  left = drawn.shape[1] - 2 * SIDE - contact_sheet.GAP
  for row, colours in enumerate((((255, 0, 0), (0, 128, 0)), ((0, 0, 255), (0, 0, 0)))):
    top = contact_sheet.GAP + row * (SIDE + contact_sheet.GAP)
    for column, colour in enumerate(colours):
      middle = drawn[top + SIDE // 2, left + column * SIDE + SIDE // 2]
      assert tuple(middle) == colour
    assert (drawn[top : top + SIDE, :left] < 128).any(), "the row's name"

"""Contact sheets: thumbnails of many images, blurred by default.

Of a dataset: random pairs, the preferred image left of the dispreferred one, and
counts. Of a generated folder: its images, or base and aligned side by side. Captions
are not drawn: like the images, they are offensive by nature.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFilter

from safetydpo_jax.data import images
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.data.sources.pairs import Image as PairImage
from safetydpo_jax.data.sources.pairs import SourcePair
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import storage

SIDE, GAP, LINE = 96, 8, 14  # pixels: an image, between pairs, a line of text
_COLUMNS, _ROWS = 4, 5
_TEXT_WIDTH = 200


def draw_sheet(
  pairs: Sequence[SourcePair],
  counts: Mapping[str, int],
  *,
  blur: bool = True,
  seed: int = 0,
) -> Image.Image:
  """Up to 20 random pairs in four columns, the counts beside them.

  Args:
    pairs: the dataset's.
    counts: what became of its rows, by name.
    blur: beyond recognition, with a radius of an eighth of the side.
    seed: of the choice.
  """
  chosen = random.Random(seed).sample(pairs, min(len(pairs), _COLUMNS * _ROWS))
  cell = (2 * SIDE + GAP, SIDE + GAP)
  rows = count_rows(pairs, counts)
  width = _COLUMNS * cell[0] + GAP + _TEXT_WIDTH
  height = max(-(-len(chosen) // _COLUMNS) * cell[1], len(rows) * LINE) + GAP
  sheet = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(sheet)
  cells = [(pair.preferred, pair.dispreferred) for pair in chosen]
  _paste(sheet, cells, _COLUMNS, blur)
  left = _COLUMNS * cell[0] + 2 * GAP
  for number, (name, count) in enumerate(rows.items()):
    top = GAP + number * LINE
    draw.text((left, top), name, fill="black")
    draw.text((width - GAP, top), f"{count:,}", fill="black", anchor="ra")
  return sheet


def draw_images(cells: Sequence[tuple[Path, ...]], *, blur: bool = True) -> Image.Image:
  """Images in rows of eight, in order; those of a cell are side by side.

  Args:
    cells: the same number of images in each.
    blur: beyond recognition, with a radius of an eighth of the side.
  """
  per_cell = len(cells[0])
  columns = min(2 * _COLUMNS // per_cell, len(cells))
  cell = (per_cell * SIDE + GAP, SIDE + GAP)
  size = (columns * cell[0] + GAP, -(-len(cells) // columns) * cell[1] + GAP)
  sheet = Image.new("RGB", size, "white")
  _paste(sheet, cells, columns, blur)
  return sheet


def draw_rows(names: Sequence[str], rows: Sequence[Sequence[Path]]) -> Image.Image:
  """Images in rows, each beside its name; nothing is blurred."""
  width = _TEXT_WIDTH + max(map(len, rows)) * SIDE + GAP
  sheet = Image.new("RGB", (width, len(rows) * (SIDE + GAP) + GAP), "white")
  draw = ImageDraw.Draw(sheet)
  for number, (name, sources) in enumerate(zip(names, rows, strict=True)):
    top = GAP + number * (SIDE + GAP)
    draw.text((GAP, top), name, fill="black")
    for column, source in enumerate(sources):
      sheet.paste(_picture(source, blur=False), (_TEXT_WIDTH + column * SIDE, top))
  return sheet


def count_rows(
  pairs: Sequence[SourcePair], counts: Mapping[str, int]
) -> dict[str, int]:
  """What is drawn beside the pairs: counts of rows, and of pairs by category."""
  tags = Counter(tag for pair in pairs for tag in pair.categories)
  rows = {name.replace("_", " "): count for name, count in counts.items()}
  rows |= {name: tags[name] for name in CATEGORIES}
  rows["several categories"] = sum(len(pair.categories) > 1 for pair in pairs)
  return rows


def save_sheet(sheet: Image.Image, file: epath.Path) -> None:
  """Writes a contact sheet as PNG.

  Raises:
    InputError: it cannot be written, or the name does not end in .png.
  """
  if file.suffix.lower() != ".png":
    raise InputError(f"--stats {file}: expected a name that ends in .png")
  with storage.writing(file) as local, storage.named(file):
    sheet.save(local, format="PNG")


def _paste(
  sheet: Image.Image, cells: Sequence[tuple], columns: int, blur: bool
) -> None:
  for number, sources in enumerate(cells):
    row, column = divmod(number, columns)
    left = GAP + column * (len(sources) * SIDE + GAP)
    for side, source in enumerate(sources):
      corner = (left + side * SIDE, GAP + row * (SIDE + GAP))
      sheet.paste(_picture(source, blur), corner)


def _picture(source: PairImage | Path, blur: bool) -> Image.Image:
  """The image; a grey cross where it cannot be read."""
  try:
    picture = Image.fromarray(np.asarray(images.load_image(source, SIDE)))
  except InputError:
    picture = Image.new("RGB", (SIDE, SIDE), "lightgrey")
    ImageDraw.Draw(picture).line((0, 0, SIDE, SIDE), fill="grey", width=2)
    return picture
  return picture.filter(ImageFilter.GaussianBlur(SIDE / 8)) if blur else picture

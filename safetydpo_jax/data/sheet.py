"""A picture of a dataset: random pairs, blurred unless asked otherwise, and counts.

Left of a pair stands the preferred image, right of it the dispreferred one. Captions
are not drawn: they are offensive by nature, as the images are.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFilter

from safetydpo_jax.data import images, places
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.data.pairs import SourcePair
from safetydpo_jax.errors import InputError

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
    blur: beyond recognition: radius an eighth of the side.
    seed: of the choice.
  """
  chosen = random.Random(seed).sample(pairs, min(len(pairs), _COLUMNS * _ROWS))
  cell = (2 * SIDE + GAP, SIDE + GAP)
  rows = count_rows(pairs, counts)
  width = _COLUMNS * cell[0] + GAP + _TEXT_WIDTH
  height = max(-(-len(chosen) // _COLUMNS) * cell[1], len(rows) * LINE) + GAP
  sheet = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(sheet)
  for place, pair in enumerate(chosen):
    row, column = divmod(place, _COLUMNS)
    for side, source in enumerate((pair.preferred, pair.dispreferred)):
      corner = (GAP + column * cell[0] + side * SIDE, GAP + row * cell[1])
      sheet.paste(_picture(source, blur), corner)
  left = _COLUMNS * cell[0] + 2 * GAP
  for number, (name, count) in enumerate(rows.items()):
    top = GAP + number * LINE
    draw.text((left, top), name, fill="black")
    draw.text((width - GAP, top), f"{count:,}", fill="black", anchor="ra")
  return sheet


def count_rows(
  pairs: Sequence[SourcePair], counts: Mapping[str, int]
) -> dict[str, int]:
  """What stands beside the pairs: rows by fate, pairs by category."""
  tags = Counter(tag for pair in pairs for tag in pair.categories)
  rows = {name.replace("_", " "): count for name, count in counts.items()}
  rows |= {name: tags[name] for name in CATEGORIES}
  rows["several categories"] = sum(len(pair.categories) > 1 for pair in pairs)
  return rows


def save_sheet(sheet: Image.Image, file: epath.Path) -> None:
  """Writes a sheet as PNG.

  Raises:
    InputError: it cannot be written, or the name does not end in .png.
  """
  if file.suffix.lower() != ".png":
    raise InputError(f"--stats {file}: expected a name that ends in .png")
  with places.writing(file) as local, places.named(file):
    sheet.save(local, format="PNG")


def _picture(source, blur: bool) -> Image.Image:
  """The image; a grey cross where it cannot be read."""
  try:
    picture = Image.fromarray(np.asarray(images.load_image(source, SIDE)))
  except InputError:
    picture = Image.new("RGB", (SIDE, SIDE), "lightgrey")
    ImageDraw.Draw(picture).line((0, 0, SIDE, SIDE), fill="grey", width=2)
    return picture
  return picture.filter(ImageFilter.GaussianBlur(SIDE / 8)) if blur else picture

"""Image files as detectors take them: RGB, 8 bits, with notes on what was unusual.

Files that cannot be read, or would fill the memory, are refused with the reason. What
can be read but is unusual is in the notes: of several frames the first counts, 16 bits
lose their lower half, and an alpha channel is dropped, as common loaders do.
"""

import hashlib
import io
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from safetydpo_jax.data.images import FORMATS, to_rgb
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_content

LARGEST = 64_000_000  # pixels; 192 MB as RGB. PIL's own limit is three times that.
HEAVIEST = 256_000_000  # bytes of a file
LONGEST = 64  # times the shorter side: a detector's resize would fill the memory
TINY = 16  # pixels of a side; a detector sees little more than one colour

# PIL's mode → the note.
MODES = {
  "1": "black and white",
  "L": "grey",
  "LA": "grey with alpha",
  "P": "palette",
  "PA": "palette with alpha",
  "RGBA": "alpha dropped",
  "RGBa": "alpha dropped",
  "La": "grey with alpha",
  "CMYK": "CMYK",
  "F": "floating point",
}


class Picture(NamedTuple):
  """An image file that was read.

  Attributes:
    image: RGB.
    notes: what is unusual about the file.
    sha256: of the file.
  """

  image: Image.Image
  notes: tuple[str, ...]
  sha256: str


def read(file: Path) -> Picture:
  """Reads an image file of any of `FORMATS`.

  Raises:
    FileNotFoundError: there is no such file.
    InputError: it is not such an image, damaged, or too large; the message says which.
  """
  content = _read_bytes(file)
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
      _check_size(*opened.size)
      notes = _notes(opened)
      opened.load()
      image = ImageOps.exif_transpose(opened)
  except UnidentifiedImageError:
    if is_lfs_content(content):
      raise InputError(NOT_FETCHED) from None
    raise InputError(f"not an image in {', '.join(FORMATS)} format") from None
  except InputError:
    raise
  except Exception as error:  # PIL's decoders raise anything for a corrupt file
    reason = str(error) or type(error).__name__
    raise InputError(f"damaged: {reason}") from error
  if "transparency" in image.info:  # PIL warns where it would drop it itself
    image = image.convert("RGBA")
  image = to_rgb(image)
  if _is_plain(image):
    notes = (*notes, "one colour")
  return Picture(image, notes, hashlib.sha256(content).hexdigest())


def _read_bytes(file: Path) -> bytes:
  try:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never end
      raise InputError("not a regular file")
    if status.st_size > HEAVIEST:
      raise InputError(
        f"{status.st_size:,} bytes; the largest file that is read has {HEAVIEST:,}"
      )
    return file.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(file) from None
  except OSError as error:
    raise InputError(f"cannot be read: {error.strerror or error}") from error


def _check_size(width: int, height: int) -> None:
  if width * height > LARGEST:
    raise InputError(
      f"{width} × {height} pixels; at most {LARGEST:,} are decoded, as a larger image "
      "may be a decompression bomb"
    )
  if max(width, height) > LONGEST * min(width, height):
    raise InputError(
      f"{width} × {height} pixels; expected a longer side of at most {LONGEST} times "
      "the shorter one"
    )


def _notes(image: Image.Image) -> tuple[str, ...]:
  notes = []
  if (frames := getattr(image, "n_frames", 1)) > 1:
    notes.append(f"first of {frames} frames")
  # PIL keeps 16 bits of grey images alone; for colours, its decoder's mode has them.
  if image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")):
    notes.append("16 bits")
  if image.mode in MODES:
    notes.append(MODES[image.mode])
  if min(image.size) < TINY:
    notes.append(f"tiny: {image.width} × {image.height}")
  return tuple(notes)


def _is_plain(image: Image.Image) -> bool:
  """Whether it has one colour, as a safety checker's black image, which seems safe."""
  pixels = np.asarray(image)
  return bool((pixels == pixels[0, 0]).all()) and min(image.size) > 1


def pixels(image: Image.Image) -> np.ndarray:
  """(h, w, 3) uint8."""
  return np.asarray(image, np.uint8)

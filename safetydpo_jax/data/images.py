"""Image files → square RGB pixels, as torchvision prepares them for Stable Diffusion.

Resize the shorter side to the resolution (bilinear with antialiasing, the longer side
rounded down), then crop the centre. Other modes become RGB with 8 bits.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from safetydpo_jax.data.sources import pairs
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_content

# What is read, and the usual endings; `prompts.WRITTEN` is what is written. Not every
# format of PIL's: it hands EPS to Ghostscript, an interpreter.
ENDINGS = {
  "JPEG": (".jpg", ".jpeg"),
  "PNG": (".png",),
  "WEBP": (".webp",),
  "GIF": (".gif",),
  "BMP": (".bmp",),
  "TIFF": (".tif", ".tiff"),
}
if "avif" in features.modules and features.check("avif"):  # not in every PIL
  ENDINGS["AVIF"] = (".avif",)
FORMATS = tuple(ENDINGS)
SUFFIXES = frozenset(ending for endings in ENDINGS.values() for ending in endings)
_LONGEST = 64  # times the shorter side; resizing a line of pixels would fill the memory


def load_image(image: pairs.Image | Path, resolution: int) -> np.ndarray:
  """Decodes an image of any of `FORMATS`, any orientation and colour mode.

  Returns:
    (resolution, resolution, 3) uint8.

  Raises:
    InputError: it is missing, truncated, corrupt, much too long, or not an image.
  """
  content = pairs.read_image(image)
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
      decoded = to_rgb(ImageOps.exif_transpose(opened))
  except UnidentifiedImageError as error:
    if is_lfs_content(content):
      raise InputError(f"image {image} {NOT_FETCHED}") from None
    raise InputError(
      f"image {image} cannot be read: its {len(content)} bytes are not an "
      f"image in any of the formats {', '.join(FORMATS)}; replace it"
    ) from error
  except Exception as error:  # PIL's decoders raise anything for a corrupt file
    reason = str(error) or type(error).__name__
    raise InputError(f"image {image} cannot be read: {reason}; replace it") from error
  if max(decoded.size) > _LONGEST * min(decoded.size):
    width, height = decoded.size
    raise InputError(
      f"image {image} has {width} x {height} pixels, expected sides that differ at "
      f"most {_LONGEST}-fold; replace it"
    )
  return np.asarray(crop_square(decoded, resolution))


def to_rgb(image: Image.Image) -> Image.Image:
  """8 bits a channel, RGB; an alpha channel is dropped, as other loaders do."""
  if image.mode.startswith("I"):  # 16 bits: PIL would clip them to 255
    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
  return image.convert("RGB")


def crop_square(
  image: Image.Image,
  resolution: int,
  resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
  """torchvision's Resize(resolution, resample) and CenterCrop(resolution)."""
  width, height = image.size
  short = min(width, height)
  size = (resolution * width // short, resolution * height // short)
  if image.size != size:
    image = image.resize(size, resample)
  left, top = (round((side - resolution) / 2.0) for side in size)
  return image.crop((left, top, left + resolution, top + resolution))

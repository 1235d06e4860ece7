"""Pictures inside a page, as data: URIs; `macros.html` draws them."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from safetydpo_jax.errors import InputError

MIME_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
VEIL = 8  # pixels of a side of what a covered picture shows


class Picture(NamedTuple):
  """A picture as a page holds it.

  Attributes:
    uri: its bytes, as a data: URI.
    alt: what a reader who does not see it should know.
    width, height: pixels of the original.
    kind: class of style.css, "pixels" (hard edges) or "photo".
    veil: URI of what stands for it until the reader asks for it, or "".
  """

  uri: str
  alt: str
  width: int
  height: int
  kind: str
  veil: str = ""


def picture(
  folder: Path, name: str, alt: str, *, pixelated: bool = False, blurred: bool = False
) -> Picture:
  """A picture of `folder`, its bytes unchanged.

  Args:
    folder: which the file must not leave.
    name: path of a PNG, JPEG or WebP file, relative to the folder.
    alt: what a reader who does not see it should know.
    pixelated: enlarge with hard edges, for pictures of few pixels.
    blurred: covered until the reader asks for it: `VEIL` × `VEIL` pixels stand for it,
      so that nothing shows without style or on paper either.

  Raises:
    InputError: the file is missing, outside of the folder, or not such a picture.
  """
  content, image = _read(folder, name)
  kind = "pixels" if pixelated else "photo"
  return _shown(image, _uri(content, str(image.format)), alt, kind, blurred)


def thumbnail(
  image: Image.Image, alt: str, longest: int, *, blurred: bool = False
) -> Picture:
  """A JPEG of at most `longest` pixels a side; smaller images keep their size.

  Args:
    image: RGB.
    alt: what a reader who does not see it should know.
    longest: pixels; an image of a quarter of it or less is shown with hard edges.
    blurred: see `picture`.
  """
  kind = "pixels" if max(image.size) * 4 <= longest else "photo"
  if max(image.size) > longest:
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
  content, form = io.BytesIO(), "PNG" if kind == "pixels" else "JPEG"
  image.save(content, form, quality=82)
  return _shown(image, _uri(content.getvalue(), form), alt, kind, blurred)


def _shown(image: Image.Image, uri: str, alt: str, kind: str, blurred: bool) -> Picture:
  if not blurred:
    return Picture(uri, alt, *image.size, kind)
  veil = io.BytesIO()
  image.convert("RGB").resize((VEIL, VEIL), Image.Resampling.BOX).save(veil, "PNG")
  return Picture(uri, alt, *image.size, kind, _uri(veil.getvalue(), "PNG"))


def _read(folder: Path, name: str) -> tuple[bytes, Image.Image]:
  """The bytes of a picture and the picture, decoded once to see that it is whole."""
  file = Path(folder, name)
  try:
    inside = file.resolve().is_relative_to(Path(folder).resolve())
    if not inside or Path(name).is_absolute():
      raise InputError(
        f"picture {name!r} is outside of {folder}; expected a path relative to it"
      )
    content = file.read_bytes()
    image = Image.open(io.BytesIO(content), formats=tuple(MIME_TYPES))
    image.load()
  except FileNotFoundError:
    raise InputError(
      f"picture {file} is missing; run the step that makes it again"
    ) from None
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise InputError(
      f"{file} is not a readable {', '.join(MIME_TYPES)} picture: {error}"
    ) from error
  return content, image


def _uri(content: bytes, kind: str) -> str:
  return f"data:{MIME_TYPES[kind]};base64,{base64.b64encode(content).decode()}"

"""Image files of every sort: read and named for what they are, or refused."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from tests.support.galleries import noise


def save(file, pixels, mode=None, **options):
  picture = Image.fromarray(pixels)
  (picture.convert(mode) if mode else picture).save(file, **options)
  return file


def test_an_rgb_image_has_nothing_to_note(tmp_path):
  pixels = noise(20, 30)
  picture = images.read(save(tmp_path / "a.png", pixels))
  assert picture.notes == ()
  assert np.array_equal(images.pixels(picture.image), pixels)
  assert len(picture.sha256) == 64


@pytest.mark.parametrize(
  ("mode", "name", "note"),
  [
    ("L", "a.png", "grey"),
    ("1", "a.png", "black and white"),
    ("LA", "a.png", "grey with alpha"),
    ("P", "a.png", "palette"),
    ("RGBA", "a.png", "alpha dropped"),
    ("CMYK", "a.jpg", "CMYK"),
  ],
)
def test_other_modes_become_rgb_and_are_named(tmp_path, mode, name, note):
  picture = images.read(save(tmp_path / name, noise(20, 30), mode))
  assert note in picture.notes
  assert picture.image.mode == "RGB"
  assert images.pixels(picture.image).shape == (20, 30, 3)


def test_16_bits_keep_their_upper_half(tmp_path):
  grey = noise(20, 30, 1).astype(np.uint16)
  picture = images.read(save(tmp_path / "a.png", grey * 256 + 200))
  assert picture.notes == ("16 bits",)
  assert np.array_equal(images.pixels(picture.image)[..., 0], grey)


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_16_bits_of_colour_are_named(tmp_path, kind, channels):
  pixels = noise(20, 30, 3 * channels)[..., : 2 * channels]
  (tmp_path / "a.png").write_bytes(png(30, 20, 16, kind, pixels))
  picture = images.read(tmp_path / "a.png")
  assert "16 bits" in picture.notes
  upper = pixels.reshape(20, 30, channels, 2)[..., :3, 0]
  assert np.array_equal(images.pixels(picture.image), upper)


def test_of_an_animation_the_first_frame_counts(tmp_path):
  first, second = (Image.fromarray(noise(20, 30, seed=s)) for s in (0, 1))
  first.save(tmp_path / "a.png", save_all=True, append_images=[second])
  picture = images.read(tmp_path / "a.png")
  assert picture.notes == ("first of 2 frames",)
  assert np.array_equal(images.pixels(picture.image), np.asarray(first))


def test_a_photograph_is_turned_upright(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(noise(20, 30)).save(tmp_path / "a.jpg", exif=exif)
  assert images.read(tmp_path / "a.jpg").image.size == (20, 30)


def test_a_transparent_palette_gives_no_warning(tmp_path):
  picture = Image.fromarray(noise(20, 30)).convert("P")
  picture.save(tmp_path / "a.png", transparency=bytes(range(256)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert images.read(tmp_path / "a.png").image.mode == "RGB"


def test_tiny_and_plain_images_are_named(tmp_path):
  assert images.read(save(tmp_path / "a.png", noise(1, 1))).notes == ("tiny: 1 × 1",)
  black = images.read(save(tmp_path / "b.png", np.zeros((64, 64, 3), np.uint8)))
  assert black.notes == ("one colour",)


def test_a_missing_file_is_not_a_broken_one(tmp_path):
  with pytest.raises(FileNotFoundError):
    images.read(tmp_path / "a.png")
  (tmp_path / "b").write_text("x")
  with pytest.raises(FileNotFoundError):
    images.read(tmp_path / "b" / "a.png")


def test_what_is_no_image_is_refused(tmp_path):
  (tmp_path / "a.png").write_text("<html>404</html>")
  with pytest.raises(InputError, match="not an image in"):
    images.read(tmp_path / "a.png")
  (tmp_path / "b.png").write_bytes(b"")
  with pytest.raises(InputError, match="not an image in"):
    images.read(tmp_path / "b.png")


def test_a_truncated_image_is_refused(tmp_path):
  file = save(tmp_path / "a.png", noise(64, 64))
  file.write_bytes(file.read_bytes()[:-3000])
  with pytest.raises(InputError, match="damaged: "):
    images.read(file)


def test_a_postscript_file_is_not_run(tmp_path):
  (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
  with pytest.raises(InputError, match="not an image in"):
    images.read(tmp_path / "a.png")


def test_a_folder_or_a_pipe_is_refused_and_not_waited_for(tmp_path):
  (tmp_path / "a.png").mkdir()
  os.mkfifo(tmp_path / "b.png")
  for name in ("a.png", "b.png"):
    with pytest.raises(InputError, match="not a regular file"):
      images.read(tmp_path / name)


def png(width, height, bits, kind, pixels):
  """A PNG's bytes; `pixels` are its rows' bytes, or None for too few of them."""

  def chunk(kind, content):
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check

  header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
  rows = bytes(100) if pixels is None else b"".join(b"\0" + r.tobytes() for r in pixels)
  parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_100, 10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
  (tmp_path / "a.png").write_bytes(png(side, side, 8, 2, None))
  with pytest.raises(InputError, match=r"decompression bomb"):
    images.read(tmp_path / "a.png")


def test_a_line_of_pixels_is_refused(tmp_path):
  with pytest.raises(InputError, match="at most 64 times"):
    images.read(save(tmp_path / "a.png", noise(1, 65)))


def test_a_huge_file_is_not_read(tmp_path):
  with open(tmp_path / "a.png", "wb") as file:
    file.truncate(images.HEAVIEST + 1)
  with pytest.raises(InputError, match=r"256,000,001 bytes; .* 256,000,000"):
    images.read(tmp_path / "a.png")


def test_a_png_under_the_name_of_a_jpeg_is_read(tmp_path):
  content = io.BytesIO()
  Image.fromarray(noise(20, 30)).save(content, "PNG")
  (tmp_path / "a.jpg").write_bytes(content.getvalue())
  assert images.read(tmp_path / "a.jpg").image.size == (30, 20)

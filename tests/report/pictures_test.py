"""Pictures of a report: read whole, never from elsewhere, covered where asked."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.report import pictures
from tests.support.pages import draw


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "deep").mkdir()
  Image.new("RGB", (32, 24), (200, 30, 40)).save(tmp_path / "deep" / "red.png")
  return tmp_path


def show(*arguments, **options):
  """A thumbnail as a page shows it."""
  return draw("{{ m.image(it) }}", it=pictures.thumbnail(*arguments, **options))


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "deep/../../x.png"])
def test_a_picture_outside_of_the_folder_is_refused(name, folder):
  with pytest.raises(InputError, match=r"is outside of .*; expected a path relative"):
    pictures.picture(folder, name, "")


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
  secret = tmp_path_factory.mktemp("elsewhere") / "secret.png"
  Image.new("RGB", (4, 4)).save(secret)
  (folder / "link.png").symlink_to(secret)
  with pytest.raises(InputError, match=r"link\.png' is outside of"):
    pictures.picture(folder, "link.png", "")


def test_an_absolute_path_is_refused_even_inside(folder):
  with pytest.raises(InputError, match="expected a path relative"):
    pictures.picture(folder, str(folder / "deep" / "red.png"), "")


def test_a_missing_picture_is_named(folder):
  with pytest.raises(InputError, match=r"deep/gone\.png is missing; run the step"):
    pictures.picture(folder, "deep/gone.png", "")


@pytest.mark.parametrize(
  "content", [b"", b"<svg onload='x'/>", b"\x89PNG\r\n\x1a\n", b"GIF89a\1\0\1\0\0\0\0"]
)
def test_what_is_no_picture_is_refused_whatever_its_name(content, folder):
  (folder / "deep" / "bad.png").write_bytes(content)
  with pytest.raises(InputError, match=r"bad\.png is not a readable PNG, JPEG, WEBP"):
    pictures.picture(folder, "deep/bad.png", "")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind, folder):
  """Browsers differ in what they show of them, and animations are no evidence."""
  Image.new("RGB", (4, 4)).save(folder / "other.png", kind)
  with pytest.raises(InputError, match=r"other\.png is not a readable PNG, JPEG, WEBP"):
    pictures.picture(folder, "other.png", "")


def test_a_picture_cut_short_is_refused(folder):
  content = (folder / "deep" / "red.png").read_bytes()
  (folder / "deep" / "cut.png").write_bytes(content[:-30])
  with pytest.raises(InputError, match=r"cut\.png is not a readable"):
    pictures.picture(folder, "deep/cut.png", "")


def test_a_name_with_a_null_byte_is_refused(folder):
  with pytest.raises(InputError, match="is not a readable"):
    pictures.picture(folder, "a\0b.png", "")


def test_a_thumbnail_is_small_and_covered_and_leaves_the_image_as_it_was():
  pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3)).astype(np.uint8)
  image = Image.fromarray(pixels)
  shown = show(image, "a <b>", 200, blurred=True)
  veil, full = re.findall(r'src="data:([^;]+);base64,([^"]+)"', shown)
  assert (veil[0], full[0]) == ("image/png", "image/jpeg")
  small = Image.open(io.BytesIO(base64.b64decode(full[1])))
  assert small.size == (200, 100)
  assert Image.open(io.BytesIO(base64.b64decode(veil[1]))).size == (8, 8)
  assert image.size == (600, 300)
  assert "a &lt;b&gt;" in shown


def test_a_thumbnail_of_few_pixels_keeps_them():
  image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
  shown = show(image, "tiny", 200)
  ((kind, content),) = re.findall(r'src="data:([^;]+);base64,([^"]+)"', shown)
  assert kind == "image/png"
  decoded = Image.open(io.BytesIO(base64.b64decode(content)))
  assert np.array_equal(np.asarray(decoded), np.asarray(image))
  assert 'class="pixels"' in shown

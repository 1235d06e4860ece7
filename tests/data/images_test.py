"""Images: any file people have becomes the pixels torchvision would have made of it."""

import io

import numpy as np
import pytest
from PIL import Image, features

from safetydpo_jax.data import images
from safetydpo_jax.errors import InputError

RNG = np.random.default_rng(0)
GRADIENT = np.stack(
  np.broadcast_arrays(np.arange(48)[:, None] * 5, np.arange(80)[None] * 3, 90), -1
).astype(np.uint8)


def save(path, image, **options):
  image.save(path, **options)
  return path


def test_the_shorter_side_becomes_the_resolution_and_the_centre_stays(tmp_path):
  picture = Image.fromarray(GRADIENT)
  for turned in (picture, picture.transpose(Image.Transpose.ROTATE_90)):
    file = save(tmp_path / "x.png", turned)
    pixels = images.load_image(file, 24)
    assert pixels.shape == (24, 24, 3)
    assert pixels.dtype == np.uint8
    small = turned.resize((40, 24) if turned.width > 48 else (24, 40), 2)
    box = (8, 0, 32, 24) if turned.width > 48 else (0, 8, 24, 32)
    np.testing.assert_array_equal(pixels, np.asarray(small.crop(box)))


@pytest.mark.parametrize("size", [(33, 48), (47, 31), (64, 64), (101, 32), (7, 9)])
def test_pixels_equal_torchvisions(tmp_path, size):
  """torchvision's own formulas, on the tensor library's antialiased bilinear."""
  torch = pytest.importorskip("torch")
  array = RNG.integers(0, 256, (*size, 3), np.uint8)
  file = save(tmp_path / "x.png", Image.fromarray(array))
  shape = tuple(int(32 * side / min(size)) for side in size)
  resized = torch.nn.functional.interpolate(
    torch.from_numpy(array).permute(2, 0, 1)[None].float(),
    shape,
    mode="bilinear",
    antialias=True,
  )[0].permute(1, 2, 0)
  top, left = (int(round((side - 32) / 2.0)) for side in shape)  # noqa: RUF046
  expected = resized[top : top + 32, left : left + 32].numpy()
  # PIL rounds to 8 bits after each of the two passes.
  difference = np.abs(images.load_image(file, 32) - expected)
  assert difference.max() <= 1.5
  assert difference.mean() < 0.5


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
  array = RNG.integers(0, 256, (16, 16, 3), np.uint8)
  file = save(tmp_path / "x.png", Image.fromarray(array))
  np.testing.assert_array_equal(images.load_image(file, 16), array)


def test_the_camera_s_orientation_is_honoured(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  file = save(tmp_path / "x.png", Image.fromarray(GRADIENT[:, :48]), exif=exif)
  upright = np.rot90(GRADIENT[:, :48], -1)
  np.testing.assert_array_equal(images.load_image(file, 48), upright)


MODES = {
  "grey": ("L", "png"),
  "grey and alpha": ("LA", "png"),
  "colour and alpha": ("RGBA", "png"),
  "palette": ("P", "png"),
  "two colours": ("1", "png"),
  "CMYK": ("CMYK", "jpg"),
  "grey JPEG": ("L", "jpg"),
  "WebP": ("RGB", "webp"),
  "AVIF": ("RGB", "avif"),
}


@pytest.mark.parametrize(("mode", "ending"), MODES.values(), ids=MODES)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, ending):
  if ending == "avif" and not features.check("avif"):
    pytest.skip("this PIL does not decode AVIF")
  grey = Image.fromarray(np.full((16, 16, 3), 204, np.uint8))
  file = save(tmp_path / f"x.{ending}", grey.convert(mode))
  pixels = images.load_image(file, 16)
  assert pixels.shape == (16, 16, 3)
  if mode != "1":  # dithered
    assert np.abs(pixels.astype(int) - 204).max() <= 3


def test_sixteen_bits_keep_their_shades(tmp_path):
  array = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
  file = save(tmp_path / "x.png", Image.fromarray(array))
  assert Image.open(file).mode.startswith("I")
  expected = np.repeat((array >> 8)[..., None], 3, -1)
  np.testing.assert_array_equal(images.load_image(file, 16), expected)


def jpeg():
  buffer = io.BytesIO()
  Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
  return buffer.getvalue()


BROKEN = {
  "truncated": lambda: jpeg()[:-2000],
  "text": lambda: b"<html>404</html>",
  "empty": lambda: b"",
  "header only": lambda: jpeg()[:20],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_named(tmp_path, content):
  (tmp_path / "x.jpg").write_bytes(content())
  with pytest.raises(
    InputError, match=r"image .*x\.jpg cannot be read: .*; replace it"
  ):
    images.load_image(tmp_path / "x.jpg", 16)


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path):
  file = tmp_path / "x.png"
  file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
  with pytest.raises(InputError, match=r"x\.png is a Git LFS pointer.*git lfs pull"):
    images.load_image(file, 16)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_a_line_of_pixels_is_refused(tmp_path, size):
  """3,000 bytes that would be 2.4 GB at resolution 512."""
  file = save(tmp_path / "x.png", Image.new("RGB", size))
  with pytest.raises(InputError, match=r"x\.png has .* differ at most 64-fold"):
    images.load_image(file, 16)


def test_no_interpreter_is_started_for_an_image(tmp_path):
  """PIL would hand EPS to Ghostscript."""
  file = save(tmp_path / "x.jpg", Image.fromarray(GRADIENT), format="EPS")
  with pytest.raises(
    InputError, match=r"x\.jpg cannot be read: .* are not an image in"
  ):
    images.load_image(file, 16)


def test_an_absurdly_large_image_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
  file = save(tmp_path / "x.png", Image.fromarray(GRADIENT))
  with pytest.raises(InputError, match=r"x\.png cannot be read.*exceeds limit"):
    images.load_image(file, 16)

"""FID's real images: what of a folder counts."""

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import quality


@pytest.mark.parametrize("name", ["a.gif", "b.TIF", "c.tiff", "deep/d.JPG", "e.avif"])
def test_images_of_every_format_count(name, tmp_path):
  (tmp_path / "README.txt").touch()
  with pytest.raises(InputError, match="contains no images"):
    quality.check_real_images(tmp_path)
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).touch()
  quality.check_real_images(tmp_path)

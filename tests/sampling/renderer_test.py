"""Which renderings share a program; from a seed to noise, from pixels to a file."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import load_pipeline
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import sharding
from safetydpo_jax.sampling.renderer import (
  initial_noise,
  key_words,
  make_renderer,
  save_image,
)


def test_equal_networks_and_settings_share_a_program(tiny_checkpoint):
  mesh = sharding.make_mesh()

  def make(steps=4, sampler="ddim", dtype=jnp.float32, schedule=None, **more):
    base = load_pipeline(tiny_checkpoint, components=(), dtype=dtype)
    base = dataclasses.replace(base, schedule=schedule or base.schedule)
    return make_renderer(base, sampler, steps, 0.0, mesh, **more)

  config = load_pipeline(tiny_checkpoint, components=()).schedule.config
  others = (
    {"steps": 5},
    {"sampler": "euler"},
    {"dtype": jnp.bfloat16},
    {"clip_skips": (1, 0)},
    {"schedule": Schedule.from_config({**config, "beta_end": 0.02})},
    {"schedule": Schedule.from_config({**config, "prediction_type": "sample"})},
  )
  first = make()
  assert make() is first
  assert len({first, *(make(**other) for other in others)}) == len(others) + 1


def test_the_seed_decides_the_noise_and_all_its_bits_count():
  seeds = [0, 1, 2**32 - 1, 2**32, 2**33, -1, 2**64 - 1, 2**63]
  noise = np.asarray(initial_noise(seeds, (4, 3, 2)))
  assert noise.shape == (8, 4, 3, 2)
  for index in range(3):
    expected = jax.random.normal(jax.random.key(seeds[index]), (4, 3, 2))
    np.testing.assert_array_equal(noise[index], expected)
  np.testing.assert_array_equal(noise[5], noise[6])  # −1 is 2⁶⁴ − 1, as in PyTorch
  assert len({picture.tobytes() for picture in noise}) == 7


def test_the_noise_of_the_first_step_is_not_that_of_the_start():
  words = key_words([7])
  key = jax.random.wrap_key_data(words, impl="threefry2x32")[0]
  start = initial_noise([7], (4, 4, 4))[0]
  first = jax.random.normal(jax.random.fold_in(key, 0), (4, 4, 4))
  assert abs(np.corrcoef(np.ravel(start), np.ravel(first))[0, 1]) < 0.3


def test_an_image_that_cannot_be_written_leaves_nothing_behind(tmp_path):
  (tmp_path / "x.png").mkdir()
  with pytest.raises(InputError, match=r"cannot write .*x\.png"):
    save_image(tmp_path / "x.png", np.zeros((2, 2, 3)))
  with pytest.raises(InputError, match=r"cannot write /proc/x\.png"):
    save_image(Path("/proc/x.png"), np.zeros((2, 2, 3)))
  assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


def test_an_image_of_nan_is_an_error_and_not_a_black_square(tmp_path):
  with pytest.raises(InputError, match=r"x\.png: .*NaN.*--dtype float32"):
    save_image(tmp_path / "x.png", np.full((2, 2, 3), np.nan))
  assert not list(tmp_path.iterdir())


def test_grey_levels_are_rounded_and_not_cut(tmp_path):
  save_image(tmp_path / "a" / "x.png", np.full((1, 1, 3), 99.6 / 255))
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / "a" / "x.png")), [[[100] * 3]]
  )


def test_jpeg_names_make_jpeg_files(tmp_path):
  save_image(tmp_path / "x.jpg", np.full((8, 8, 3), 0.5))
  assert Image.open(tmp_path / "x.jpg").format == "JPEG"

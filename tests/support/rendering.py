"""Prompts and noise to render from, and images to compare."""

import csv

import numpy as np
from PIL import Image

# None of them at its default.
SETTINGS = {
  "sampler": "euler",
  "steps": 7,
  "guidance": 3.0,
  "no_row_guidance": True,
  "guidance_rescale": 0.5,
  "negative_prompt": "red",
  "height": 16,
  "width": 24,
  "dtype": "bfloat16",
  "variant": "fp16",
  "vae": "other",
  "fix_text": True,
  "prompt_style": "long",
  "clip_skip": 1,
  "original_size": "512,768",
  "crop_top_left": "8,0",
  "target_size": "16,24",
  "negative_original_size": "9,9",
  "negative_crop_top_left": "1,2",
  "negative_target_size": "3,4",
}

HEIGHT, WIDTH = 16, 24
STEPS, GUIDANCE = 5, 7.5
PROMPTS = ['the "red" one, and the blue', "in the sand\non an ant", ""]


def write_noise(file, rows):
  """Initial noise for so many rows in PyTorch's order, no two axes of one size."""
  noise = np.random.default_rng(0).standard_normal((rows, 4, HEIGHT // 2, WIDTH // 2))
  np.save(file, noise.astype(np.float32))
  return file


def write_csv(path, columns, *rows):
  with open(path, "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([columns, *rows])
  return path


def read_images(out):
  """A folder's images as {name: (H, W, 3) int}."""
  files = sorted(out.glob("[!.]*.png"))
  return {file.name: np.asarray(Image.open(file)).astype(int) for file in files}


def assert_equal_to_rounding(ours, expected):
  """Images of two folders differ by one grey level at most."""
  assert ours.keys() == expected.keys()
  for name, image in expected.items():
    assert image.std() > 10, "a grey picture would equal any other"
    assert np.abs(ours[name] - image).max() <= 1, name

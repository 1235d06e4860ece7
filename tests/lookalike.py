"""Look-alikes of published preference datasets, made on the fly.

Scenes are coloured discs on plain backgrounds; the dispreferred image wears a black
cross, which plays the harm. The quirks of the published files are in:

  pair 0   quotes, commas, a line break and `~` in its captions
  pair 1   stands twice
  pair 2   stands under two categories
  pair 3   is PNG, the others are JPEG
  pair 4   is portrait where the others are landscape, or the reverse
  all      categories as CoProV2 spells them; folder layout only: two ties

Both layouts of the same arguments hold the same pairs.
"""

import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = (
  "Hate",
  "sexual",
  "Violence",
  "Shocking",
  "Illegal Activity",
  "Harrasment",
  "self-harm",
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
QUIRK = ' with "quotes", commas, ~ tildes\nand a second line'


class Scene(NamedTuple):
  """A pair as the files will name it."""

  safe: str
  unsafe: str
  safe_caption: str
  unsafe_caption: str
  category: str


def write_folder_layout(path, pairs=12, seed=0, size=(40, 48), ties=2) -> Path:
  """A folder with metadata.jsonl and images; `size` is (height, width). → the folder"""
  path = Path(path)
  rows = []
  for row, scene in enumerate(_write_scenes(path, pairs, seed, size)):
    for own, caption in (
      (scene.unsafe, scene.unsafe_caption),
      (scene.safe, scene.safe_caption),
    ):
      images = (scene.safe, scene.unsafe) if row % 2 else (scene.unsafe, scene.safe)
      rows.append(
        {
          "file_name": own,
          "jpg_0": images[0],
          "jpg_1": images[1],
          "label_0": row % 2,
          "caption": caption,
          "category": scene.category,
        }
      )
  rows += [{**rows[0], "label_0": tie} for tie in (0.5, None)[:ties]]
  lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  (path / "metadata.jsonl").write_text(lines, encoding="utf-8")
  return path


def write_csv_layout(path, pairs=12, seed=0, size=(40, 48), images="images") -> Path:
  """A folder with train.csv and a folder `images` ("" for beside it). → the folder"""
  path = Path(path)
  scenes = _write_scenes(path / images, pairs, seed, size)
  with open(path / "train.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "image", "category"])
    for scene in scenes:
      writer.writerow([scene.unsafe_caption, scene.unsafe, scene.category])
      writer.writerow([scene.safe_caption, scene.safe, scene.category])
  return path


def _write_scenes(folder, pairs, seed, size) -> list[Scene]:
  """Writes the images; returns what the rows say, repetitions included."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  scenes = []
  for number in range(pairs):
    ending = "png" if number == 3 else "jpg"
    height, width = size[::-1] if number == 4 else size
    back, front = rng.choice(COLOURS, 2, replace=False)
    quirk = QUIRK if number == 0 else ""
    scene = Scene(
      safe=f"s_idx_{number:07d}_0.{ending}",
      unsafe=f"u_idx_{number:07d}_0.{ending}",
      safe_caption=f"a {front} disc {number} on {back}{quirk}",
      unsafe_caption=f"a {front} disc {number} on {back} with a cross{quirk}",
      category=CATEGORIES[number % len(CATEGORIES)],
    )
    image = _draw_disc(rng, str(back), str(front), height, width)
    image.save(folder / scene.safe, quality=92)
    _draw_cross(image).save(folder / scene.unsafe, quality=92)
    scenes.append(scene)
  scenes += scenes[1:2]
  scenes += [scene._replace(category=CATEGORIES[0]) for scene in scenes[2:3]]
  return scenes


def _draw_disc(rng, back, front, height, width) -> Image.Image:
  image = Image.new("RGB", (width, height), back)
  radius = min(height, width) // 4
  x = int(rng.integers(radius, width - radius))
  y = int(rng.integers(radius, height - radius))
  box = (x - radius, y - radius, x + radius, y + radius)
  ImageDraw.Draw(image).ellipse(box, fill=front)
  return image


def _draw_cross(image) -> Image.Image:
  image = image.copy()
  width, height = image.size
  stroke = max(2, width // 16)
  draw = ImageDraw.Draw(image)
  corners = (width // 3, height // 3, 2 * width // 3, 2 * height // 3)
  draw.line(corners, fill="black", width=stroke)
  draw.line((corners[2], *corners[1::-1], corners[3]), fill="black", width=stroke)
  return image

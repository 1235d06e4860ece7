"""Look-alikes of published preference datasets, made on the fly.

Scenes are coloured discs on plain backgrounds; the dispreferred image wears a black
cross, which plays the harm. The quirks of the published files are in:

  pair 0   quotes, commas, a line break and `~` in its captions
  pair 1   stands twice
  pair 2   stands under two categories
  pair 3   is PNG, the others are JPEG
  pair 4   is portrait where the others are landscape, or the reverse
  pair 5   has pair 4's prompts, and images and a category of its own
  all      categories as CoProV2 spells them; not in a CSV: two ties

All of `LAYOUTS` hold the same pairs for the same arguments. The parquet layouts hold no
categories; CoProV2's CSV, which does, stands beside them. `damage` may change or delete
the images before they are packed.
"""

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
_BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Scene(NamedTuple):
  """A pair as the files will name it."""

  safe: str
  unsafe: str
  safe_caption: str
  unsafe_caption: str
  category: str


def write_folder_layout(
  path, pairs=12, seed=0, size=(40, 48), ties=2, damage=None
) -> Path:
  """A folder with metadata.jsonl and images; `size` is (height, width). → the folder"""
  path = Path(path)
  scenes = _write_scenes(path, pairs, seed, size, damage)
  rows = [
    {
      "file_name": own,
      **_choice(number, scene),
      "caption": caption,
      "category": scene.category,
    }
    for number, scene in enumerate(scenes)
    for own, caption in (
      (scene.unsafe, scene.unsafe_caption),
      (scene.safe, scene.safe_caption),
    )
  ]
  rows += [{**rows[0], "label_0": tie} for tie in (0.5, None)[:ties]]
  lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  (path / "metadata.jsonl").write_text(lines, encoding="utf-8")
  return path


def write_csv_layout(
  path, pairs=12, seed=0, size=(40, 48), images="images", damage=None
) -> Path:
  """A folder with train.csv and a folder `images` ("" for beside it). → the folder"""
  path = Path(path)
  _write_csv(path, _write_scenes(path / images, pairs, seed, size, damage))
  return path


def write_hub_layout(
  path, pairs=12, seed=0, size=(40, 48), ties=2, damage=None, image_paths=True, shards=2
) -> Path:
  """The hub's parquet files in `data`: safe rows first, then unsafe ones. → the folder

  Args:
    path, pairs, seed, size, ties, damage: as for the other layouts.
    image_paths: whether `image.path` says whose bytes these are.
    shards: how many files.
  """
  path = Path(path)
  with tempfile.TemporaryDirectory() as folder:
    scenes = _write_scenes(Path(folder), pairs, seed, size, damage)
    _write_csv(path, scenes)
    scenes = list({scene.safe: scene for scene in scenes}.values())
    scenes += [scene._replace(safe_caption="tie") for scene in scenes[:ties]]
    rows = [
      {
        "image": {
          "bytes": _content(folder, own),
          "path": own if image_paths else None,
        },
        **_choice(number, scene),
        **({"label_0": 2} if scene.safe_caption == "tie" else {}),
        "caption": caption,
      }
      for kind in ("safe", "unsafe")
      for number, scene in enumerate(scenes)
      for own, caption in [(getattr(scene, kind), getattr(scene, f"{kind}_caption"))]
    ]
  _write_parquet(path / "data", rows, shards, {"image": _BYTES, "label_0": pa.int64()})
  return path


def write_pick_a_pic_layout(
  path, pairs=12, seed=0, size=(40, 48), ties=2, damage=None, names=True, shards=2
) -> Path:
  """Parquet files with both images' bytes in each row. → the folder

  Args:
    path, pairs, seed, size, ties, damage: as for the other layouts.
    names: whether `image_0_uid` and `image_1_uid` are there.
    shards: how many files.
  """
  path = Path(path)
  with tempfile.TemporaryDirectory() as folder:
    scenes = _write_scenes(Path(folder), pairs, seed, size, damage)
    _write_csv(path, scenes)
    rows = [
      {
        "jpg_0": _content(folder, choice["jpg_0"]),
        "jpg_1": _content(folder, choice["jpg_1"]),
        **(
          {"image_0_uid": choice["jpg_0"], "image_1_uid": choice["jpg_1"]}
          if names
          else {}
        ),
        "label_0": float(choice["label_0"]),
        "caption": caption,
      }
      for number, scene in enumerate(scenes)
      for choice in [_choice(number, scene)]
      for caption in (scene.unsafe_caption, scene.safe_caption)
    ]
  rows += [{**rows[0], "label_0": tie} for tie in (0.5, None)[:ties]]
  _write_parquet(path, rows, shards, {"jpg_0": pa.binary(), "jpg_1": pa.binary()})
  return path


def write_prepared_layout(path, **arguments) -> Path:
  """What `data/sources/coprov2.py` builds from the folder layout. → the built folder"""
  import tensorflow_datasets as tfds

  from safetydpo_jax.data.sources.coprov2 import Coprov2

  path = Path(path)
  source = write_folder_layout(path / "source", **arguments)
  builder = Coprov2(data_dir=path / "built", file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=source)
  )
  return Path(builder.data_dir)


LAYOUTS: dict[str, Callable[..., Path]] = {
  "folder": write_folder_layout,
  "csv": write_csv_layout,
  "hub": write_hub_layout,
  "pick_a_pic": write_pick_a_pic_layout,
  "prepared": write_prepared_layout,
}


def write_published_csv(file: Path) -> Path:
  """A CSV without images and with the published counts. → the file

  32,086 rows are 16,043 row pairs, 15,690 of them distinct by their images; 321 pairs
  stand under more than one category. 353 row pairs name the images of another one: 321
  add a second category, 21 a third, 11 none. Pairs 1, 2 and 3 have the prompts of pairs
  101, 102 and 103, of other categories.
  """
  distinct = [(number, CATEGORIES[number % 7]) for number in range(15690)]
  again = [(number, CATEGORIES[(number + 1) % 7]) for number in range(321)]
  third = [(number, CATEGORIES[(number + 2) % 7]) for number in range(21)]
  same = [(number, CATEGORIES[number % 7]) for number in range(321, 332)]
  with open(file, "w", newline="", encoding="utf-8") as lines:
    writer = csv.writer(lines)
    writer.writerow(["prompt", "image", "category"])
    for number, category in distinct + again + third + same:
      scene = number + 100 if number in (1, 2, 3) else number
      quirk = QUIRK if scene % 100 == 0 else ""
      for kind, end in (("u", " with a cross"), ("s", "")):
        name = f"{kind}_idx_{number:07d}_0.jpg"
        writer.writerow([f"scene {scene}{end}{quirk}", name, category])
  return file


def write_published_hub(folder: Path, published: Path) -> Path:
  """The hub's 31,380 rows for that CSV, without bytes. → the folder"""
  with open(published, newline="", encoding="utf-8") as lines:
    table = list(csv.DictReader(lines))
  prompts = {row["image"]: row["prompt"] for row in table}
  own = sorted(prompts.items())  # safe ones first
  rows = [
    {
      "image": {"bytes": None, "path": image},
      "jpg_0": f"s{image[1:]}",
      "jpg_1": f"u{image[1:]}",
      "label_0": 1,
      "caption": prompt,
    }
    for image, prompt in own
  ]
  _write_parquet(folder, rows, 2, {"image": _BYTES})
  return folder


def _choice(number: int, scene: Scene) -> dict:
  """jpg_0, jpg_1 and label_0; the preferred image takes turns."""
  images = (scene.safe, scene.unsafe) if number % 2 else (scene.unsafe, scene.safe)
  return {"jpg_0": images[0], "jpg_1": images[1], "label_0": number % 2}


def _content(folder, name: str) -> bytes | None:
  file = Path(folder) / name
  return file.read_bytes() if file.exists() else None


def _write_parquet(folder: Path, rows: list[dict], shards: int, types: dict) -> None:
  """Rows in files of equal length, with row groups of five rows."""
  folder.mkdir(parents=True, exist_ok=True)
  table = pa.Table.from_pylist(rows)
  for name, kind in types.items():
    place = table.column_names.index(name)
    table = table.set_column(place, name, table.column(name).cast(kind))
  step = -(-len(rows) // shards)
  for number in range(shards):
    part = table.slice(number * step, step)
    name = f"train-{number:05d}-of-{shards:05d}.parquet"
    pq.write_table(part, folder / name, row_group_size=5)


def _write_csv(path: Path, scenes: list[Scene]) -> None:
  path.mkdir(parents=True, exist_ok=True)
  with open(path / "train.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["prompt", "image", "category"])
    for scene in scenes:
      writer.writerow([scene.unsafe_caption, scene.unsafe, scene.category])
      writer.writerow([scene.safe_caption, scene.safe, scene.category])


def _write_scenes(folder, pairs, seed, size, damage) -> list[Scene]:
  """Writes the images; returns what the rows say, repetitions included."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  scenes = []
  for number in range(pairs):
    ending = "png" if number == 3 else "jpg"
    height, width = size[::-1] if number == 4 else size
    back, front = rng.choice(COLOURS, 2, replace=False)
    words = f"a {front} disc {number} on {back}{QUIRK if number == 0 else ''}"
    if number == 5:
      words = scenes[4].safe_caption
    scene = Scene(
      safe=f"s_idx_{number:07d}_0.{ending}",
      unsafe=f"u_idx_{number:07d}_0.{ending}",
      safe_caption=words,
      unsafe_caption=words.replace(" on ", " with a cross on "),
      category=CATEGORIES[number % len(CATEGORIES)],
    )
    image = _draw_disc(rng, str(back), str(front), height, width)
    image.save(folder / scene.safe, quality=92)
    _draw_cross(image).save(folder / scene.unsafe, quality=92)
    scenes.append(scene)
  if damage:
    damage(folder)
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

"""Co-Merge's statistics on disk: activations of each expert, and which won.

  STATISTICS/<sha256[:16]>.safetensors   one file for each expert, named by its factors:
      <layer path>/a  (inputs, r)        float32, equation (1) of `comerge.py`
      <layer path>/b  (inputs, out)      float32, equation (2)
      header: expert (JSON of path, category, sha256 …), calibration (JSON: cache and
      base fingerprints, categories, pairs, timesteps, seed, dtype)

An input takes 0.4 MB for SD1.5 (128 layers, rank 4: 100,352 units); the default, 28
pairs × 4 timesteps × 2 images, 90 MB per expert. A file is valid whatever experts it is
merged with, as long as the calibration is the same.

  winners.txt   shares of units won, by part and layer
  winners.png   the same as a heat map, a row for each layer, a column for each expert
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tabulate import tabulate

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.lora import Tree
from safetydpo_jax.runtime import files, manifest

TABLE, PICTURE = "winners.txt", "winners.png"
_CELL, _MARGIN, _FONT = (40, 16), 8, 11  # pixels
_FULL = np.array([8, 69, 148])  # the colour of a share of 1; 0 is white


def file_of(folder: Path, sha256: str) -> Path:
  """Where an expert's activations are."""
  return Path(folder) / f"{sha256[:16]}.safetensors"


def write_activations(
  folder: Path, activations: Tree, about: dict[str, Any], calibration: dict[str, Any]
) -> None:
  """Writes one expert's activations through a temporary name.

  Args:
    folder: made if it is missing.
    activations: tree of (inputs, units) float32.
    about: the expert's row of expert.json, with its sha256.
    calibration: what decides the inputs.

  Raises:
    InputError: it cannot be written.
  """
  file = file_of(folder, about["sha256"])
  tensors = {
    "/".join(path): np.ascontiguousarray(leaf, np.float32)
    for path, leaf in flatten_dict(activations).items()
  }
  header = {"expert": json.dumps(about), "calibration": json.dumps(calibration)}
  with files.writing(file) as temporary, files.naming(file):
    try:
      save_file(tensors, temporary, metadata=header)
    except SafetensorError as error:
      raise InputError(f"cannot write {file}: {error}") from error


def read_activations(
  folder: Path, lora: Tree, sha256: str, calibration: dict[str, Any], inputs: int
) -> dict | None:
  """One expert's activations, None if they were not measured yet.

  Args:
    folder: of the statistics.
    lora: the expert's LoRA tree, which the activations must fit.
    sha256: of its factors.
    calibration: this merge's.
    inputs: how many.

  Raises:
    InputError: the file is damaged, or was measured on other inputs.
  """
  file = file_of(folder, sha256)
  if not file.exists():
    return None
  tensors, header = open_safetensors(file)
  try:
    about, before = (json.loads(header[name]) for name in ("expert", "calibration"))
    same = about["sha256"] == sha256 and isinstance(before, dict)
  except (KeyError, TypeError, json.JSONDecodeError):
    same = False
  if not same:
    raise InputError(f"{file} is not a statistics file of this expert; delete it")
  for name, value in calibration.items():
    if before.get(name) != value:
      raise InputError(
        f"{file} was measured {manifest.change(name, before.get(name), value)}; choose "
        "another --statistics"
      )
  wanted = {
    "/".join(path): (inputs, leaf.shape[1]) for path, leaf in flatten_dict(lora).items()
  }
  if {name: tensor.shape for name, tensor in tensors.items()} != wanted or not all(
    tensor.dtype == np.float32 and np.isfinite(tensor).all()
    for tensor in tensors.values()
  ):
    raise InputError(f"{file} does not fit the expert; delete it, and merge again")
  return unflatten_dict({tuple(name.split("/")): x for name, x in tensors.items()})


def win_shares(wins: Tree) -> dict[tuple[str, str], np.ndarray]:
  """{(layer in PyTorch's name, part): share of its units each expert won, (N,)}."""
  shares = {}
  for path, counts in sorted(flatten_dict(wins).items()):
    winners = np.bincount(counts.argmax(0), minlength=len(counts))
    shares[torch_name(path[:-1]), path[-1]] = winners / counts.shape[1]
  return shares


def write_table(
  folder: Path, wins: Tree, activations: Sequence[Tree], labels: Sequence[str]
) -> str:
  """Writes winners.txt; returns its summary, the lines above the layers.

  Args:
    folder: to write to.
    wins: tree of (N, units).
    activations: of each expert, for the mean activation in the summary.
    labels: a name for each expert.
  """
  parts = sorted({path[-1] for path in flatten_dict(wins)})
  summary = []
  for part in parts:
    counts = [x for path, x in flatten_dict(wins).items() if path[-1] == part]
    bins = [np.bincount(x.argmax(0), minlength=len(labels)) for x in counts]
    won = np.sum(bins, axis=0)
    summary.append([f"{part} won", *_percent(won / won.sum())])
    means = [
      np.mean([x.mean() for path, x in flatten_dict(tree).items() if path[-1] == part])
      for tree in activations
    ]
    summary.append([f"{part} mean", *(f"{mean:.3g}" for mean in means)])
  rows = [
    [part, *_percent(share), layer] for (layer, part), share in win_shares(wins).items()
  ]
  right = ["right"] * len(labels)
  style = {"tablefmt": "plain", "disable_numparse": True}
  above = tabulate(summary, ["", *labels], colalign=["left", *right], **style)
  below = tabulate(
    rows, ["", *labels, "layer"], colalign=["left", *right, "left"], **style
  )
  text = "\n".join([above, "", "units won, by layer", below, ""])
  files.write_text(Path(folder) / TABLE, text)
  return above


def _percent(shares: np.ndarray) -> list[str]:
  return [f"{100 * share:.1f} %" for share in shares]


def draw_winners(folder: Path, wins: Tree, labels: Sequence[str]) -> None:
  """Writes winners.png: per layer (rows) and part and expert (columns) the share."""
  shares = win_shares(wins)
  layers = sorted({layer for layer, _ in shares})
  parts = sorted({part for _, part in shares})
  font = ImageFont.load_default(_FONT)
  left = max(int(font.getlength(layer)) for layer in layers) + 2 * _MARGIN
  top = max(int(font.getlength(f"{part}: {x}")) for x in labels for part in parts)
  top += 2 * _MARGIN
  cell_width, cell_height = _CELL
  block = len(labels) * cell_width + _MARGIN
  size = left + len(parts) * block, top + len(layers) * cell_height + _MARGIN
  image = Image.new("RGB", size, "white")
  pen = ImageDraw.Draw(image)

  for row, layer in enumerate(layers):
    y = top + row * cell_height
    pen.text((_MARGIN, y + 1), layer, "black", font)
    for column, part in enumerate(parts):
      for n, share in enumerate(shares[layer, part]):
        x = left + column * block + n * cell_width
        colour = tuple(np.round(255 + share * (_FULL - 255)).astype(int).tolist())
        pen.rectangle((x, y, x + cell_width - 2, y + cell_height - 2), colour)
        ink = "white" if share > 0.5 else "black"
        pen.text((x + 6, y + 1), f"{100 * share:.0f} %", ink, font)
  for column, part in enumerate(parts):
    for n, label in enumerate(labels):
      name = Image.new("RGB", (top - _MARGIN, cell_height), "white")
      ImageDraw.Draw(name).text((0, 1), f"{part}: {label}", "black", font)
      name = name.rotate(90, expand=True)
      image.paste(name, (left + column * block + n * cell_width + 12, 0))
  file = Path(folder) / PICTURE
  with files.writing(file) as temporary, files.naming(file):
    image.save(temporary, "PNG")

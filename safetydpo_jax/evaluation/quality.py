"""FID of the folders: between the images and real ones, and between both models.

  fid   {of: folder, against: "statistics" or "reference", fid, images, caution}

Real images are given as the statistics of their features (.npz with mu and sigma, as
pytorch-fid saves them), or as a folder, whose statistics are then left beside the
figures to be given the next time. FID has no interval: it is biased by the number of
images more than it varies, and says so (`caution`) below 2,048.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.detectors import Detector
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.scoring import exchange
from safetydpo_jax.metrics import fid, provenance

STATISTICS = "fid_statistics.npz"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def watch(model: fid.Fid, statistics: fid.Statistics) -> Detector:
  """A detector without columns: it adds what it sees to `statistics`."""

  def judge(arrays: list[np.ndarray], prompts: list[str]) -> dict[str, list]:
    del prompts
    statistics.add(fid.features(model, np.stack(arrays)))
    return {}

  return Detector("inception", model.about, fid.prepare, judge)


def together(statistics: fid.Statistics) -> fid.Statistics:
  """What all hosts have seen, the same on each."""
  if jax.process_count() == 1:
    return statistics
  content = io.BytesIO()
  # Not its save and load: they refuse the one image that a host may have seen.
  state = {"mu": statistics.mu, "scatter": statistics.scatter}
  np.savez(content, count=statistics.count, **state)
  total = fid.Statistics(len(statistics.mu))
  for part in exchange(content.getvalue()):
    with np.load(io.BytesIO(part), allow_pickle=False) as arrays:
      other = fid.Statistics(len(statistics.mu))
      other.count, other.mu = int(arrays["count"]), arrays["mu"]
      other.scatter = arrays["scatter"]
    total.merge(other)
  return total


def check_real(place: Path) -> None:
  """Refuses real images that FID cannot be measured against, without looking at them.

  Raises:
    InputError: there are none, or the file is none of this network's statistics.
  """
  if place.is_dir():
    _real_images(place)
  elif (found := len(fid.Statistics.load(place).mu)) != len(fid.Statistics().mu):
    raise InputError(
      f"--fid_statistics {place} has {found} features, FID's network has "
      f"{len(fid.Statistics().mu)}; make them with that network"
    )


def _real_images(folder: Path) -> list[Path]:
  files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
  if not files:
    raise InputError(f"--fid_statistics {folder} holds no images")
  return files


def of_real(
  place: Path, model: fid.Fid, size: int, out: Path
) -> tuple[fid.Statistics, dict[str, Any]]:
  """Statistics of real images, read from a file or measured on a folder; whose.

  Args:
    place: an .npz file, or a folder with images.
    model: FID's network.
    size: images of a batch.
    out: where a folder's statistics are left, by host 0.

  Returns:
    The statistics, and for figures.json the file with its hash, or the folder with the
    number of its images and a hash over all of their bytes.

  Raises:
    InputError: there are none, or an image cannot be read.
  """
  if not place.is_dir():
    return fid.Statistics.load(place), provenance.describe(place)
  files = _real_images(place)
  host, hosts = jax.process_index(), jax.process_count()
  own = files[host::hosts]
  statistics, digests = fid.Statistics(), []
  bar = {"unit": "image", "desc": "real images", "disable": host > 0}
  with tqdm(total=len(own), **bar) as progress:
    for start in range(0, len(own), size):
      batch = []
      for file in own[start : start + size]:
        try:
          picture = images.read(file)
        except InputError as error:
          raise InputError(f"--fid_statistics: {file} is {error}; remove it") from error
        batch.append(fid.prepare(picture.image))
        digests.append(picture.sha256)
      statistics.add(fid.features(model, np.stack(batch)))
      progress.update(len(batch))
  statistics = together(statistics)
  parts = exchange(" ".join(digests).encode())
  everything = sorted(b" ".join(parts).split())
  if host == 0:
    out.mkdir(parents=True, exist_ok=True)
    statistics.save(out / STATISTICS)
  return statistics, {
    "folder": str(place),
    "images": len(files),
    "fingerprint": hashlib.sha256(b" ".join(everything)).hexdigest()[:16],
  }


def rows(
  seen: dict[str, fid.Statistics], real: fid.Statistics | None
) -> list[dict[str, Any]]:
  """FID of each folder against real images, and of the images against the reference."""
  pairs: Sequence = [(name, "statistics", real) for name in seen if real is not None]
  if REFERENCE in seen:
    pairs = [*pairs, (IMAGES, REFERENCE, seen[REFERENCE])]
  return [
    {
      "of": name,
      "against": against,
      "fid": round(fid.distance(seen[name], other), 4),
      "images": seen[name].count,
      "caution": fid.caution(seen[name], other),
    }
    for name, against, other in pairs
  ]

"""FID of the folders: against real images, and of the images against the reference.

  fid   {of: folder, against: "statistics" or "reference", fid, images, caution}

Real images are given as the statistics of their features (.npz with mu and sigma, as
pytorch-fid saves them), or as a folder; the folder's statistics are then written next
to the figures, for the next run. FID has no interval: its bias, which depends on the
number of images, is larger than its variance. `caution` says so below 2,048 images.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from safetydpo_jax.data.images import SUFFIXES
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import images
from safetydpo_jax.evaluation.detectors import Detector
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.scoring import exchange
from safetydpo_jax.metrics import fid, provenance

STATISTICS = "fid_statistics.npz"
# Also where PIL does not read AVIF, so that such an image is refused and not left out.
_SUFFIXES = SUFFIXES | {".avif"}


def collector(model: fid.Fid, statistics: fid.Statistics) -> Detector:
  """A detector without columns, which adds the features it sees to `statistics`."""

  def judge(arrays: list[np.ndarray], prompts: list[str]) -> dict[str, list]:
    del prompts
    statistics.add(fid.features(model, np.stack(arrays)))
    return {}

  return Detector("inception", model.about, fid.prepare, judge)


def gather(statistics: fid.Statistics) -> fid.Statistics:
  """The statistics of all hosts' features, the same on each."""
  if jax.process_count() == 1:
    return statistics
  content = io.BytesIO()
  # `Statistics.save` refuses a single image, which a host's share may be.
  state: dict[str, Any] = {"mu": statistics.mu, "scatter": statistics.scatter}
  np.savez(content, count=np.array(statistics.count), **state)
  total = fid.Statistics(len(statistics.mu))
  for part in exchange(content.getvalue()):
    with np.load(io.BytesIO(part), allow_pickle=False) as arrays:
      other = fid.Statistics(len(statistics.mu))
      other.count, other.mu = int(arrays["count"]), arrays["mu"]
      other.scatter = arrays["scatter"]
    total.merge(other)
  return total


def check_real_images(source: Path) -> None:
  """Checks `--fid_statistics` without reading an image.

  Raises:
    InputError: the folder has no images, or the file's statistics are not those of
      FID's network.
  """
  if source.is_dir():
    _real_images(source)
  elif (found := len(fid.Statistics.load(source).mu)) != len(fid.Statistics().mu):
    raise InputError(
      f"--fid_statistics {source} has {found} features, FID's network has "
      f"{len(fid.Statistics().mu)}; make the statistics with that network"
    )


def _real_images(folder: Path) -> list[Path]:
  files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES)
  if not files:
    raise InputError(f"--fid_statistics {folder} contains no images")
  return files


def real_statistics(
  source: Path, model: fid.Fid, size: int, out: Path
) -> tuple[fid.Statistics, dict[str, Any]]:
  """Statistics of real images, read from a file or measured on a folder.

  Args:
    source: an .npz file, or a folder with images.
    model: FID's network.
    size: images per batch.
    out: where host 0 writes a folder's statistics.

  Returns:
    The statistics, and for figures.json the file with its hash, or the folder with the
    number of its images and a hash over all of their bytes.

  Raises:
    InputError: there are no images, or one cannot be read.
  """
  if not source.is_dir():
    return fid.Statistics.load(source), provenance.describe(source)
  files = _real_images(source)
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
          raise InputError(
            f"--fid_statistics: {file} cannot be used: {error}; remove it"
          ) from error
        batch.append(fid.prepare(picture.image))
        digests.append(picture.sha256)
      statistics.add(fid.features(model, np.stack(batch)))
      progress.update(len(batch))
  statistics = gather(statistics)
  parts = exchange(" ".join(digests).encode())
  everything = sorted(b" ".join(parts).split())
  if host == 0:
    statistics.save(out / STATISTICS)
  return statistics, {
    "folder": str(source),
    "images": len(files),
    "fingerprint": hashlib.sha256(b" ".join(everything)).hexdigest()[:16],
  }


def rows(
  folders: dict[str, fid.Statistics], real: fid.Statistics | None
) -> list[dict[str, Any]]:
  """FID of each folder against real images, and of the images against the reference."""
  pairs = [(name, "statistics", real) for name in folders if real is not None]
  if REFERENCE in folders:
    pairs.append((IMAGES, REFERENCE, folders[REFERENCE]))
  return [
    {
      "of": name,
      "against": against,
      "fid": round(fid.distance(folders[name], other), 4),
      "images": folders[name].count,
      "caution": fid.caution(folders[name], other),
    }
    for name, against, other in pairs
  ]

"""FID: the distance between the features of two sets of images (Heusel et al., 2017).

    d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁ Σ₂)^½                             (1)

Preparation, features and file format are pytorch-fid's: the whole image at 299 × 299 by
bilinear interpolation without antialiasing, 2048 pooled features, `mu` and `sigma` in
an .npz file.

The last trace of (1) is the sum of the singular values of F₁ᵀ F₂ with Σ = F Fᵀ, since
(Σ₁ Σ₂)^½ has the square roots of the eigenvalues of Σ₁ Σ₂, and those are the singular
values of F₁ᵀ F₂ squared. F = V √λ comes from a symmetric eigendecomposition in float64,
without eigenvalues below d · 2.2e-16 · λ_max, which are rounding. So the product may be
singular, as it always is below 2049 images: nothing is added to its diagonal and no
imaginary part is discarded. pytorch-fid takes scipy's root of the unsymmetric product
and adds 1e-6 to both diagonals when that fails.

Means and scatter are streamed (Chan, Golub and LeVeque, 1979): no features are kept,
and the statistics of separate sets can be merged.
"""

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics import inception, provenance
from safetydpo_jax.metrics.extraction import Extractor, make_extractor
from safetydpo_jax.runtime import files

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
_SOURCE = (
  f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
)
ENOUGH = 2048  # images; with fewer, a covariance of 2048 features is singular


@dataclasses.dataclass(frozen=True)
class Fid:
  """The network; made by `load`.

  Attributes:
    about: its weights, as JSON.
    extract: images → features.
  """

  about: dict[str, Any]
  extract: Extractor = dataclasses.field(repr=False)


def load(
  weights: str | Path | None = None,
  *,
  mesh: Mesh | None = None,
  per_device: int = 8,
) -> Fid:
  """Reads the Inception network's weights.

  Args:
    weights: pytorch-fid's .pth, or the same tensors as .safetensors; by default the
      file that pytorch-fid downloads to PyTorch's cache.
    mesh, per_device: see `extraction.make_extractor`.

  Raises:
    InputError: the file is missing or damaged.
  """
  file = Path(weights) if weights else _cached()
  if not file.is_file():
    raise InputError(
      f"{file} does not exist; get FID's Inception weights from {_SOURCE}"
    )
  about = {"name": "FID", "inception": provenance.describe(file)}
  network = inception.Inception()

  def apply(params: dict[str, Any], images: jax.Array) -> Any:
    return network.apply({"params": params}, images)

  extract = make_extractor(
    apply,
    inception.read_weights(file),
    mesh=mesh,
    per_device=per_device,
  )
  return Fid(about, extract)


def _cached() -> Path:
  home = os.environ.get("TORCH_HOME", "~/.cache/torch")
  return Path(home).expanduser() / "hub" / "checkpoints" / WEIGHTS


def prepare(image: Image.Image) -> np.ndarray:
  """An RGB image resized to (299, 299, 3), float32 in [0, 1]."""
  pixels = np.asarray(image.convert("RGB"), np.float32) / 255
  for axis in (0, 1):
    length = pixels.shape[axis]
    position = (np.arange(inception.SIZE) + 0.5) * (length / inception.SIZE) - 0.5
    position = np.maximum(position, 0).astype(np.float32)
    first = position.astype(np.int64)
    second = np.minimum(first + 1, length - 1)
    share = position - first.astype(np.float32)
    share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    pixels = (1 - share) * pixels.take(first, axis) + share * pixels.take(second, axis)
  return pixels


def features(model: Fid, batch: np.ndarray) -> np.ndarray:
  """Prepared images (n, 299, 299, 3) float32 → (n, 2048) float32."""
  side = inception.SIZE
  if batch.dtype != np.float32 or batch.shape[1:] != (side, side, 3):
    raise InputError(
      f"Inception takes images of (n, {side}, {side}, 3) float32, not {batch.shape} "
      f"{batch.dtype}; make them with prepare(image)"
    )
  return model.extract(batch)


class Statistics:
  """Mean and covariance of features, streamed in float64.

  Attributes:
    count: how many features were added; None for a file that does not say.
    mu: (d,) the mean.
    scatter: (d, d) Σ (x - μ)(x - μ)ᵀ; the covariance where `count` is None.
  """

  def __init__(self, dimensions: int = inception.FEATURES):
    self.count: int | None = 0
    self.mu = np.zeros(dimensions)
    self.scatter = np.zeros((dimensions, dimensions))

  @property
  def sigma(self) -> np.ndarray:
    """(d, d) the covariance, divided by count - 1 as `np.cov` does."""
    if self.count is None:
      return self.scatter
    if self.count < 2:
      raise InputError(f"FID needs 2 or more images, this set has {self.count}")
    return self.scatter / (self.count - 1)

  def add(self, features: np.ndarray) -> None:
    """Adds features (n, d) of any float type, finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or features.shape[1] != len(self.mu):
      raise ValueError(f"features {features.shape}, expected (n, {len(self.mu)})")
    if not np.isfinite(features).all():
      raise ValueError("features that are not finite")
    if len(features):
      mean = features.mean(0)
      centred = features - mean
      self._join(len(features), mean, centred.T @ centred)

  def merge(self, other: "Statistics") -> None:
    """Adds the features of another set."""
    if len(other.mu) != len(self.mu):
      raise ValueError(f"{len(other.mu)} features, expected {len(self.mu)}")
    if other.count:
      self._join(other.count, other.mu, other.scatter)
    elif other.count is None:
      raise InputError("statistics without a count cannot be merged")

  def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    if self.count is None:
      raise InputError("features cannot be added to statistics without a count")
    total = self.count + count
    step = mean - self.mu
    self.scatter += scatter + np.outer(step, step) * (self.count * count / total)
    self.mu = self.mu + step * (count / total)
    self.count = total

  def save(self, file: str | os.PathLike) -> None:
    """Writes `mu`, `sigma` (pytorch-fid reads them) and `count` as .npz."""
    arrays: dict[str, Any] = {"mu": self.mu, "sigma": self.sigma}
    if self.count is not None:
      arrays["count"] = np.int64(self.count)
    with (
      files.writing(file) as temporary,
      files.naming(file),
      temporary.open("wb") as opened,  # NumPy would add an ending to a name
    ):
      np.savez(opened, **arrays)

  @classmethod
  def load(cls, file: str | os.PathLike) -> "Statistics":
    """Reads an .npz file of ours or of pytorch-fid's.

    Raises:
      InputError: the file is missing, damaged, or has no mean and covariance.
    """
    try:
      with np.load(file, allow_pickle=False) as arrays:
        mu, sigma = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
        count = int(arrays["count"]) if "count" in arrays.files else None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
      raise InputError(
        f"cannot read FID statistics from {file} ({error}); expected an .npz file with "
        "mu and sigma, as pytorch-fid --save-stats writes it"
      ) from error
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not mu.size:
      raise InputError(
        f"{file} has mu {mu.shape} and sigma {sigma.shape}; expected (d,) and (d, d)"
      )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
      raise InputError(f"{file} has values that are not finite; compute it again")
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * np.abs(sigma).max()):
      raise InputError(f"{file} has a sigma that is not symmetric; compute it again")
    if count is not None and count < 2:
      raise InputError(f"{file} has a count of {count} images; expected 2 or more")
    made = cls(len(mu))
    made.mu, made.count = mu, count
    made.scatter = sigma if count is None else sigma * (count - 1)
    return made


def distance(a: Statistics, b: Statistics) -> float:
  """Equation (1), not negative; symmetric in a and b.

  Raises:
    InputError: one has fewer than 2 images, or another number of features.
  """
  if len(a.mu) != len(b.mu):
    raise InputError(
      f"one set has {len(a.mu)} features, the other {len(b.mu)}; FID needs both from "
      "the same network"
    )
  step, sigma_a, sigma_b = a.mu - b.mu, a.sigma, b.sigma
  cross = np.linalg.svd(_factor(sigma_a).T @ _factor(sigma_b), compute_uv=False).sum()
  squared = step @ step + np.trace(sigma_a) + np.trace(sigma_b) - 2 * cross
  return max(float(squared), 0.0)


def _factor(sigma: np.ndarray) -> np.ndarray:
  """F (d, rank) with F Fᵀ = sigma up to rounding."""
  values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
  keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
  return vectors[:, keep] * np.sqrt(values[keep])


def caution(*statistics: Statistics) -> str | None:
  """A warning if a set is too small for a comparable FID, else None."""
  known = [s.count for s in statistics if s.count is not None]
  if not known or min(known) >= ENOUGH:
    return None
  return (
    f"FID of {min(known)} images: below {ENOUGH} it is biased upwards and can only be "
    "compared with figures of equally many images"
  )

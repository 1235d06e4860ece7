"""Confidence intervals: how much a figure depends on the prompts that were drawn.

Images of one prompt are alike, so the prompts are the sample: m prompts, of which
prompt c has n_c images with the sum of values S_c; N images in total. Every interval is
at 95 %.

Shares. Where few images are positive, or few are negative, a bootstrap only repeats its
sample: 0 of 100 gives [0, 0]. So Wilson's interval, z = 1.96,

  (p + z²/2k ± z √(p (1 - p) / k + z²/4k²)) / (1 + z²/k)                            (1)

with k the number of images of different prompts with the same information,

  k = p (1 - p) / var p,   var p = m / (m - 1) · Σ (S_c - p n_c)² / N²              (2)

at most N, and N itself if every prompt has one image. (2) is unreliable while fewer
than `FEW` prompts have an image that differs from the rest; then k is at most m. Scores
from 0 to 1 vary less than decisions and are treated like them, so that their intervals
are too wide rather than too narrow.

Means of unbounded scores, by the bootstrap-t: resample prompts, and with t* = (mean* -
mean) / se* in each resample and se from (2) with the mean in place of p,

  [mean - se · q(97.5 %), mean - se · q(2.5 %)],  q the quantiles of t*             (3)

The plain percentile interval is too narrow for few prompts (it covers 92 % with 20 of
them). Below `FEW` prompts q is Student's, with m - 1 degrees of freedom.

Paired differences of decisions, d = aligned - base in {-1, 0, 1} for each image: the
percentile bootstrap over prompts, after adding a prompt with d = +1 and one with
d = -1. Without these, for the reason above, the interval of models that never disagree
would be [0, 0]. Its variance is that of Bonett and Price's adjusted interval (2012, doi
10.1177/0962280211415469).
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of the normal distribution at 95 %
LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
FEW = 10
RESAMPLES = 4000
_CELLS = 4_000_000  # resampled prompts at a time; keeps memory under 100 MB


class Sample(NamedTuple):
  """Values grouped by prompt; float64 arrays of length m.

  Attributes:
    sums: S_c.
    sizes: n_c.
  """

  sums: np.ndarray
  sizes: np.ndarray


def gather(values: np.ndarray, prompts: np.ndarray) -> Sample:
  """Values (n,) of images and the prompts (n,) they belong to → sums by prompt.

  The sums are in the order of the prompts' numbers, so that the images' order does not
  change an interval.
  """
  values = np.asarray(values, np.float64)
  _, owner = np.unique(np.asarray(prompts), return_inverse=True)
  sizes = np.bincount(owner).astype(np.float64)
  return Sample(np.bincount(owner, values, len(sizes)), sizes)


def wilson(share: float, n: float) -> tuple[float, float]:
  """Equation (1) with k = n."""
  centre = share + Z**2 / (2 * n)
  reach = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
  low, high = ((centre + side * reach) / (1 + Z**2 / n) for side in (-1, 1))
  return max(low, 0.0), min(high, 1.0)


def share_interval(sample: Sample) -> tuple[float, float]:
  """Equations (1) and (2), for values from 0 to 1; m ≥ 1."""
  images, prompts = sample.sizes.sum(), len(sample.sizes)
  share = sample.sums.sum() / images
  if prompts == images:
    return wilson(share, images)
  positive = np.count_nonzero(sample.sums)
  negative = np.count_nonzero(sample.sums < sample.sizes)
  known = images
  if 0 < share < 1 and prompts > 1:
    known = min(share * (1 - share) / _standard_error(sample) ** 2, images)
  if min(positive, negative) < FEW:
    known = min(known, prompts)
  return wilson(share, max(known, 1.0))


def _standard_error(sample: Sample) -> float:
  """The root of equation (2)'s variance; infinite if m is 1."""
  prompts, images = len(sample.sizes), sample.sizes.sum()
  if prompts < 2:
    return math.inf
  off = sample.sums - sample.sums.sum() / images * sample.sizes
  return math.sqrt(prompts / (prompts - 1) * (off @ off)) / images


def _resampled(columns: np.ndarray, seed: int) -> np.ndarray:
  """Sums of resampled rows: (m, k) → (RESAMPLES, k)."""
  rows = len(columns)
  generator = np.random.Generator(np.random.PCG64(seed))
  size = max(1, min(RESAMPLES, _CELLS // rows))
  sums = []
  for start in range(0, RESAMPLES, size):
    count = min(size, RESAMPLES - start)
    drawn = generator.integers(rows, size=(count, rows))
    drawn += rows * np.arange(count)[:, None]
    times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
    # One column at a time, by additions alone: every BLAS gives the same digits.
    sums.append(np.stack([(times * c[None, :]).sum(axis=1) for c in columns.T], axis=1))
  return np.concatenate(sums)


def mean_interval(sample: Sample, seed: int = 0) -> tuple[float, float] | None:
  """Equation (3); None for a single prompt, which does not determine an interval."""
  prompts, images = len(sample.sizes), sample.sizes.sum()
  if prompts < 2:
    return None
  mean, error = sample.sums.sum() / images, _standard_error(sample)
  if prompts < FEW or error == 0:
    from scipy import special  # not above: `--help` does not need it

    reach = error * special.stdtrit(prompts - 1, TAILS[1])
    return mean - reach, mean + reach
  # Values are centred, so that the squares below lose no digits.
  s, n = sample.sums - mean * sample.sizes, sample.sizes
  total, count, ss, sn, nn = _resampled(
    np.stack([s, n, s * s, s * n, n * n], axis=1), seed
  ).T
  shift = total / count
  squares = np.maximum(ss - 2 * shift * sn + shift**2 * nn, 0)
  errors = np.sqrt(prompts / (prompts - 1) * squares) / count
  low, high = np.quantile(shift[errors > 0] / errors[errors > 0], TAILS)
  return float(mean - error * high), float(mean - error * low)


def difference_interval(sample: Sample, seed: int = 0) -> tuple[float, float]:
  """The interval of paired differences of decisions, values from -1 to 1; m ≥ 1."""
  sums = np.concatenate([sample.sums, [1.0, -1.0]])
  sizes = np.concatenate([sample.sizes, [1.0, 1.0]])
  total, count = _resampled(np.stack([sums, sizes], axis=1), seed).T
  low, high = np.quantile(total / count, TAILS)
  return float(low), float(high)

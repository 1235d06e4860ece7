"""Intervals cover the truth as often as they say, also at the ends of the scale.

Each coverage is of 2,000 simulated experiments with fixed seeds: where the truth is
95 %, their share has a standard deviation of 0.5 %. The bounds are four of these away;
intervals of few counts, which are whole, may cover more.
"""

import numpy as np
import pytest
from scipy import stats

from safetydpo_jax.metrics import intervals as bootstrap
from safetydpo_jax.metrics.intervals import Sample

EXPERIMENTS = 2000
LEAST, MOST = 0.93, 0.97


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Resamples enough for a simulation."""
  monkeypatch.setattr(bootstrap, "RESAMPLES", 1000)


def coverage(draw, interval, truth, seed=0):
  """The share of experiments whose interval holds the truth."""
  rng = np.random.default_rng(seed)
  hits = 0
  for number in range(EXPERIMENTS):
    low, high = interval(draw(rng), number)
    hits += low <= truth <= high
  return hits / EXPERIMENTS


def share(sample, seed):
  del seed
  return bootstrap.share_interval(sample)


def alike(rng, rate, prompts):
  """One to five images for each prompt, which are all positive or all not."""
  sizes = rng.integers(1, 6, prompts).astype(float)
  return Sample((rng.random(prompts) < rate) * sizes, sizes)


def independent(rng, rate, prompts):
  sizes = rng.integers(1, 6, prompts)
  return Sample(rng.binomial(sizes, rate).astype(float), sizes.astype(float))


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
@pytest.mark.parametrize(("draw", "most"), [(alike, MOST), (independent, 1.0)])
def test_a_shares_interval_covers_it(draw, most, rate):
  """With few positive prompts, independent images are given too much room: see FEW."""
  found = coverage(lambda rng: draw(rng, rate, 200), share, rate)
  assert LEAST <= found <= most


@pytest.mark.parametrize("centre", [0.02, 0.5, 0.98])
def test_a_shares_interval_covers_it_with_an_image_each(centre):
  """Exactly, over all counts of 200, and on average over rates: counts are whole."""
  images, covered = 200, []
  intervals = [
    bootstrap.share_interval(Sample((np.arange(images) < k) * 1.0, np.ones(images)))
    for k in range(images + 1)
  ]
  for rate in np.linspace(centre - 0.019, centre + 0.019, 39):
    chances = stats.binom.pmf(np.arange(images + 1), images, rate)
    covered.append(sum(c for c, (a, b) in zip(chances, intervals) if a <= rate <= b))
  assert 0.94 <= np.mean(covered) <= 0.96


def test_a_shares_interval_is_wilsons_with_an_image_each():
  sample = Sample(np.array([1.0, 0, 0, 1, 0, 0, 0]), np.ones(7))
  expected = stats.binomtest(2, 7).proportion_ci(0.95, "wilson")
  assert bootstrap.share_interval(sample) == pytest.approx(tuple(expected), abs=1e-6)


def test_nothing_of_many_is_not_nothing_for_sure():
  low, high = bootstrap.share_interval(Sample(np.zeros(100), np.ones(100)))
  assert low == 0
  assert 0.03 < high < 0.04


@pytest.mark.parametrize("prompts", [6, 12, 30])
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_a_means_interval_covers_it(kind, prompts):
  def values(rng, size):
    if kind == "normal":
      return rng.standard_normal(size)
    return rng.gamma(4, size=size) - 4

  def draw(rng):
    owner = np.repeat(np.arange(prompts), 2)
    shared = values(rng, prompts)[owner]
    return bootstrap.gather(shared + values(rng, len(owner)), owner)

  found = coverage(draw, bootstrap.mean_interval, 0.0)
  assert LEAST <= found <= MOST


@pytest.mark.parametrize(
  ("before", "after", "prompts"),
  [(0.5, 0.2, 40), (0.9, 0.1, 60), (0.04, 0.02, 100), (0.3, 0.3, 60)],
)
def test_a_paired_differences_interval_covers_it(before, after, prompts):
  """Prompts have a temper of their own, which both models follow in part."""

  def draw(rng):
    owner = np.repeat(np.arange(prompts), 2)
    temper = rng.random(prompts)[owner]
    own = rng.random((2, len(owner)))
    follows = rng.random((2, len(owner))) < 0.5
    level = np.where(follows, temper, own)
    decisions = (level[1] < after) * 1.0 - (level[0] < before) * 1.0
    return bootstrap.gather(decisions, owner)

  found = coverage(draw, bootstrap.difference_interval, after - before)
  assert LEAST <= found <= 0.99


def test_models_that_never_disagree_are_not_equal_for_sure():
  low, high = bootstrap.difference_interval(Sample(np.zeros(50), np.ones(50)))
  assert -0.1 < low < -0.02
  assert 0.02 < high < 0.1


def test_images_of_one_prompt_are_drawn_together():
  """Ten images each of 20 prompts tell as much as 20 images if they are alike."""
  values = np.random.default_rng(0).standard_normal(20)
  alone = bootstrap.mean_interval(bootstrap.gather(values, np.arange(20)))
  tenfold = bootstrap.mean_interval(
    bootstrap.gather(np.repeat(values, 10), np.repeat(np.arange(20), 10))
  )
  assert tenfold == pytest.approx(alone)


def test_a_single_prompt_tells_nothing_of_a_mean():
  assert bootstrap.mean_interval(Sample(np.array([3.0]), np.array([5.0]))) is None


def test_equal_values_have_an_interval_of_no_width():
  sample = Sample(np.full(30, 2.5), np.ones(30))
  assert bootstrap.mean_interval(sample) == pytest.approx((2.5, 2.5))


def test_the_order_of_images_changes_nothing():
  rng = np.random.default_rng(0)
  values, owner = rng.standard_normal(60), rng.integers(0, 20, 60)
  order = rng.permutation(60)
  first = bootstrap.gather(np.round(values, 3), owner)
  second = bootstrap.gather(np.round(values, 3)[order], owner[order])
  assert bootstrap.mean_interval(first) == pytest.approx(
    bootstrap.mean_interval(second), abs=1e-12
  )


def test_memory_does_not_change_what_is_drawn(monkeypatch):
  """Resamples are drawn in parts; the parts' size is not seen in the interval."""
  sample = Sample(np.arange(20.0), np.ones(20))
  whole = bootstrap.mean_interval(sample)
  monkeypatch.setattr(bootstrap, "_CELLS", 20 * 7)
  assert bootstrap.mean_interval(sample) == whole

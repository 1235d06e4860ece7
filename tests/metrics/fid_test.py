"""FID equals its closed form, scipy's and pytorch-fid's; its statistics add up."""

import numpy as np
import pytest
import scipy.linalg

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics import fid

TOLERANCE = 1e-6


def draw(count, dimensions, seed=0, shift=0.0):
  """Correlated features."""
  rng = np.random.default_rng(seed)
  mixing = rng.standard_normal((dimensions, dimensions)) / dimensions**0.5
  return rng.standard_normal((count, dimensions)) @ mixing + shift


def statistics(features):
  made = fid.Statistics(features.shape[1])
  made.add(features)
  return made


def gaussian(mu, sigma, folder):
  """Statistics with exactly this mean and covariance."""
  np.savez(folder / "a.npz", mu=mu, sigma=sigma)
  return fid.Statistics.load(folder / "a.npz")


def by_scipy(a, b):
  """Equation (1) as pytorch-fid computes it."""
  root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
  step = a.mu - b.mu
  return step @ step + np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.trace(root)


@pytest.mark.parametrize("dimensions", [1, 3, 64])
def test_equals_scipy(dimensions):
  a = statistics(draw(500, dimensions))
  b = statistics(draw(700, dimensions, seed=1, shift=0.3))
  expected = by_scipy(a, b)
  assert expected > 0.05
  assert abs(fid.distance(a, b) - expected) < TOLERANCE


def test_equals_pytorch_fids_own_function():
  try:
    from pytorch_fid.fid_score import calculate_frechet_distance
  except (ImportError, RuntimeError, OSError) as error:
    pytest.skip(f"pytorch-fid or its torchvision cannot be imported: {error}")
  a, b = statistics(draw(500, 32)), statistics(draw(700, 32, seed=1, shift=0.3))
  try:
    expected = calculate_frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
  except (TypeError, ValueError) as error:
    pytest.skip(f"pytorch-fid does not fit this scipy: {error}")
  assert abs(fid.distance(a, b) - expected) < TOLERANCE


def test_equals_the_closed_form_of_commuting_covariances(tmp_path):
  """d² = |μ₁ - μ₂|² + Σ (√λ₁ - √λ₂)², whatever the common axes."""
  rng = np.random.default_rng(0)
  axes, _ = np.linalg.qr(rng.standard_normal((50, 50)))
  first, second = rng.uniform(0.1, 4, (2, 50))
  mu = rng.standard_normal((2, 50))
  a = gaussian(mu[0], axes * first @ axes.T, tmp_path)
  b = gaussian(mu[1], axes * second @ axes.T, tmp_path)
  expected = np.sum((mu[0] - mu[1]) ** 2) + np.sum((first**0.5 - second**0.5) ** 2)
  assert abs(fid.distance(a, b) - expected) < TOLERANCE


def test_singular_covariances_have_their_exact_distance(tmp_path):
  """Fewer images than features: scipy's root loses digits here, or fails."""
  rng = np.random.default_rng(0)
  axes, _ = np.linalg.qr(rng.standard_normal((60, 60)))
  first, second = rng.uniform(0.1, 4, (2, 60))
  first[30:], second[:20] = 0, 0
  zero = np.zeros(60)
  a = gaussian(zero, axes * first @ axes.T, tmp_path)
  b = gaussian(zero, axes * second @ axes.T, tmp_path)
  expected = np.sum((first**0.5 - second**0.5) ** 2)
  assert abs(fid.distance(a, b) - expected) < TOLERANCE
  few = statistics(draw(20, 60))
  assert fid.distance(few, few) < TOLERANCE
  nothing = gaussian(zero, np.zeros((60, 60)), tmp_path)
  assert abs(fid.distance(few, nothing) - np.trace(few.sigma) - few.mu @ few.mu) < 1e-6


def test_is_symmetric_zero_at_itself_and_never_negative():
  a, b = statistics(draw(90, 40)), statistics(draw(80, 40, seed=1))
  assert abs(fid.distance(a, b) - fid.distance(b, a)) < TOLERANCE
  selves = [statistics(draw(90, 40, seed)) for seed in range(10)]
  assert all(0 <= fid.distance(s, s) < TOLERANCE for s in selves)


def test_streamed_statistics_equal_numpys():
  features = draw(1000, 20, shift=3.0).astype(np.float32)
  made = fid.Statistics(20)
  for part in np.array_split(features, [1, 2, 300, 300, 999]):
    made.add(part)
  wide = features.astype(np.float64)
  assert made.count == 1000
  np.testing.assert_allclose(made.mu, wide.mean(0), rtol=0, atol=1e-12)
  np.testing.assert_allclose(made.sigma, np.cov(wide, rowvar=False), rtol=0, atol=1e-12)


def test_a_large_mean_does_not_swallow_the_variance():
  features = draw(300, 5) + 1e7
  made = fid.Statistics(5)
  for part in np.array_split(features, 7):
    made.add(part)
  np.testing.assert_allclose(made.sigma, np.cov(features, rowvar=False), rtol=1e-6)


def test_parts_counted_apart_add_up():
  features = draw(100, 7, shift=1.0)
  whole, merged = statistics(features), fid.Statistics(7)
  for part in np.array_split(features, 3):
    merged.merge(statistics(part))
  merged.merge(fid.Statistics(7))
  assert merged.count == 100
  np.testing.assert_allclose(merged.mu, whole.mu, rtol=0, atol=1e-12)
  np.testing.assert_allclose(merged.sigma, whole.sigma, rtol=0, atol=1e-12)


def test_a_saved_file_comes_back_and_pytorch_fid_reads_it(tmp_path):
  made = statistics(draw(100, 7))
  made.save(tmp_path / "reference.npz")
  assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]
  back = fid.Statistics.load(tmp_path / "reference.npz")
  assert back.count == 100
  np.testing.assert_allclose(back.sigma, made.sigma, rtol=1e-14)
  with np.load(tmp_path / "reference.npz") as f:
    m, s = f["mu"][:], f["sigma"][:]
  np.testing.assert_array_equal(m, made.mu)
  np.testing.assert_array_equal(s, made.sigma)


def test_a_file_of_pytorch_fid_compares_but_does_not_grow(tmp_path):
  features = draw(100, 7)
  theirs = gaussian(features.mean(0), np.cov(features, rowvar=False), tmp_path)
  assert theirs.count is None
  assert fid.distance(theirs, statistics(features)) < TOLERANCE
  with pytest.raises(InputError, match="features cannot be added"):
    theirs.add(features)
  with pytest.raises(InputError, match="cannot be merged"):
    statistics(features).merge(theirs)
  theirs.save(tmp_path / "again.npz")
  assert fid.Statistics.load(tmp_path / "again.npz").count is None


@pytest.mark.parametrize(
  ("arrays", "said"),
  [
    ({"mu": np.zeros(3)}, "cannot read FID statistics"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\)"),
    ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
    ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [3, 4.0]])}, "not symmetric"),
    ({"mu": np.zeros(2), "sigma": np.eye(2), "count": 1}, "of 1 images"),
    ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot read FID statistics"),
  ],
)
def test_a_file_of_something_else_is_refused(tmp_path, arrays, said):
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(InputError, match=said):
    fid.Statistics.load(tmp_path / "a.npz")


def test_broken_files_and_broken_features_are_refused(tmp_path):
  (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
  for name in ("a.npz", "missing.npz"):
    with pytest.raises(InputError, match="cannot read FID statistics"):
      fid.Statistics.load(tmp_path / name)
  np.save(tmp_path / "b.npy", np.zeros(3))
  with pytest.raises(InputError, match="cannot read FID statistics"):
    fid.Statistics.load(tmp_path / "b.npy")
  with pytest.raises(ValueError, match="finite"):
    fid.Statistics(2).add(np.array([[np.inf, 0]]))
  with pytest.raises(ValueError, match="expected"):
    fid.Statistics(2).add(np.zeros((3, 4)))


def test_statistics_that_cannot_be_written_are_one_line():
  statistics = fid.Statistics(2)
  statistics.add(np.eye(2))
  with pytest.raises(InputError, match=r"cannot write /proc/x\.npz"):
    statistics.save("/proc/x.npz")


def test_too_few_images_are_said():
  one = statistics(draw(1, 4))
  with pytest.raises(InputError, match="2 or more images, this set has 1"):
    fid.distance(one, one)
  with pytest.raises(InputError, match="same network"):
    fid.distance(statistics(draw(5, 4)), statistics(draw(5, 3)))
  few, many = statistics(draw(2047, 2)), statistics(draw(2048, 2))
  assert "2047 images" in fid.caution(many, few)
  assert fid.caution(many, many) is None

"""The detector and the reader: exact on rendered pictures, bounded on degraded ones."""

import math

import numpy as np
import pytest
from scipy import ndimage

from safetydpo_jax.errors import InputError
from safetydpo_jax.toyworld.world import degradation, detector, scenes, symbols
from safetydpo_jax.toyworld.world.scenes import Scene, Shape


def drawn(n, seed=0):
  """`n` scenes of both splits."""
  rng = np.random.default_rng(seed)
  return [scenes.sample_scene(rng, ("train", "heldout")[i % 2]) for i in range(n)]


def pictures(some, concepts=None):
  concepts = concepts or [None] * len(some)
  return np.stack([scenes.render(s, c) for s, c in zip(some, concepts)])


@pytest.fixture(scope="module")
def errors():
  return degradation.measured_error(seed=3, n=504)


def test_every_symbol_is_found_in_every_rendered_scene():
  concepts = [c for c in symbols.CONCEPTS for _ in range(16)]
  images = pictures(drawn(len(concepts)), concepts)
  found = detector.detect_symbols(images)
  np.testing.assert_array_equal(found.concept, [c.index for c in concepts])
  np.testing.assert_allclose(found.score, 1, atol=1e-3)
  flagged, categories = detector.inappropriate(images)
  assert flagged.all()
  assert categories == [c.category for c in concepts]


def test_no_symbol_is_found_where_none_is():
  images = pictures(scenes.all_scenes())
  found = detector.detect_symbols(images)
  assert (found.concept == -1).all()
  assert found.score.max() < 0.05
  assert found.residue.max() < 0.5
  flagged, categories = detector.inappropriate(images[:5])
  assert not flagged.any()
  assert categories == [None] * 5


def test_every_rendered_scene_is_read_exactly_with_or_without_symbol():
  space = scenes.all_scenes()
  concepts = [symbols.CONCEPTS[i % 42] if i % 2 else None for i in range(len(space))]
  reading = detector.read_scene(pictures(space, concepts))
  assert reading.scenes == space
  assert reading.error.max() < 1


def test_the_background_is_read_from_the_ground_and_not_from_a_tinted_shape():
  """A yellow that departs from grey as true yellow does from mint."""
  grey, mint = (np.asarray(scenes.BACKGROUNDS[name]) for name in ("grey", "mint"))
  image = np.full((1, 32, 32, 3), grey, np.uint8)
  image[0, 4:12, 4:12] = np.clip(
    np.asarray(scenes.COLOURS["yellow"]) + grey - mint, 0, 255
  )
  assert detector.read_scene(image).scenes[0].background == "grey"


def test_a_symbol_one_pixel_off_is_found_and_one_elsewhere_is_not():
  image = pictures(drawn(1), [symbols.CONCEPTS[11]])
  for shift in [(1, 0), (0, -1), (-1, 1)]:
    assert detector.detect_symbols(np.roll(image, shift, (1, 2))).concept == 11
  assert detector.detect_symbols(np.roll(image, (8, 8), (1, 2))).concept == -1


def test_a_shape_in_the_symbols_place_is_no_symbol():
  """Without rival templates a quarter of these shapes would count as one."""
  images = []
  for background in scenes.BACKGROUNDS.values():
    for shape in scenes.SHAPES:
      image = np.empty((32, 32, 3))
      image[:] = background
      colour, opacity = scenes.sprite(shape)
      image[16:, 16:] = image[16:, 16:] * (1 - opacity) + colour
      images.append(image.round().astype(np.uint8))
  found = detector.detect_symbols(np.stack(images))
  assert (found.score > detector.THRESHOLD).mean() > 0.2
  assert (found.concept == -1).all()


def test_a_faint_symbol_scores_less_and_its_residue_shows():
  scene = drawn(1)
  safe, marked = pictures(scene), pictures(scene, [symbols.CONCEPTS[4]])
  faint = np.round(0.85 * safe + 0.15 * marked).astype(np.uint8)
  found = detector.detect_symbols(np.concatenate([marked, faint, safe]))
  assert found.concept.tolist() == [4, -1, -1]
  assert 0.2 < found.score[1] < 0.4
  assert found.residue[0] > 5 * found.residue[1] > 5 * found.residue[2]


def test_pictures_of_one_colour_have_a_score_and_no_symbol():
  for colour in (*scenes.COLOURS.values(), (0, 0, 0), (255, 255, 255)):
    image = np.full((1, 32, 32, 3), colour, np.uint8)
    with np.errstate(all="raise"):
      found = detector.detect_symbols(image)
    assert found.concept == -1
    assert np.isfinite(detector.read_scene(image).error).all()


def test_noise_is_read_as_some_scene_with_a_large_error():
  noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
  assert detector.read_scene(noise).error.min() > 50
  assert (detector.detect_symbols(noise).concept == -1).all()


def test_no_error_up_to_the_degradation_of_an_autoencoder(errors):
  for level in ("clean", "light", "autoencoder"):
    assert max(errors[level].values()) == 0, level


def test_stronger_degradation_loses_symbols_before_it_invents_or_confuses_them(errors):
  assert 0 < errors["strong"]["missed"] < 0.1
  for level in ("strong", "extreme"):
    assert errors[level]["false_alarm"] == 0
    assert errors[level]["confused"] < 0.02
  assert errors["strong"]["background"] < 0.1
  assert errors["strong"]["colour"] < 0.02


def test_measured_error_depends_on_the_seed_alone():
  first = degradation.measured_error(seed=1, n=84)
  assert first == degradation.measured_error(seed=1, n=84)
  assert first != degradation.measured_error(seed=2, n=84)


def test_degradation_blurs_fades_drifts_and_adds_noise():
  rng = np.random.default_rng(0)
  image = pictures(drawn(1)).repeat(200, axis=0)
  np.testing.assert_array_equal(
    degradation.degrade(image, degradation.Level(), rng), image
  )
  faded = degradation.degrade(image, degradation.Level(contrast=0.5), rng)
  np.testing.assert_allclose(faded - 128.0, (image - 128.0) / 2, atol=0.5)
  drifted = degradation.degrade(image, degradation.Level(drift=5), rng) - image.astype(
    float
  )
  np.testing.assert_allclose(drifted[:, 31, 31].std(), 5, rtol=0.15)
  np.testing.assert_allclose(drifted[0, 31, 30], drifted[0, 31, 31])
  grey = np.full((1, 32, 32, 3), 128, np.uint8)
  noisy = degradation.degrade(grey, degradation.Level(noise=10), rng)
  np.testing.assert_allclose(noisy.std(), 10, rtol=0.1)


def test_blur_keeps_the_mean_and_has_the_width_it_says():
  image = np.zeros((1, 33, 33, 1))
  image[0, 16, 16] = 1
  blurred = detector.blur(image, 1.5)[0, :, :, 0]
  np.testing.assert_allclose(blurred.sum(), 1, rtol=1e-6)
  spread = ((np.arange(33) - 16) ** 2 * blurred.sum(axis=0)).sum()
  np.testing.assert_allclose(np.sqrt(spread), 1.5, rtol=0.02)
  np.testing.assert_array_equal(detector.blur(image, 0.0), image)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sigma", [0.3, *detector.BLURS])
def test_blur_equals_scipys_in_every_bit(sigma, dtype):
  images = np.random.default_rng(0).uniform(0, 255, (3, 5, 9, 4)).astype(dtype)
  reach = math.ceil(3 * sigma)
  expected = ndimage.gaussian_filter(
    images, sigma, axes=(1, 2), mode="nearest", radius=reach
  )
  found = detector.blur(images, sigma)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, expected)


def test_attributes_are_judged_one_by_one():
  circle, square = Shape("small", "red", "circle"), Shape("large", "blue", "square")
  asked = Scene("mint", circle, square, "left_of")
  read = [
    asked,
    Scene("grey", circle, square, "left_of"),
    Scene("mint", square, circle, "left_of"),
    Scene("mint", circle, square, "above"),
    Scene("mint", circle),
  ]
  right = detector.attributes_right(read, [asked] * 5)
  assert right["background"].tolist() == [True, False, True, True, True]
  assert right["colour"].tolist() == [True, True, False, True, False]
  assert right["size"].tolist() == right["shape"].tolist() == right["colour"].tolist()
  assert right["relation"].tolist() == [True, True, True, False, False]
  assert right["scene"].tolist() == [True, False, False, False, False]


def test_no_pictures_give_no_answers():
  none = np.empty((0, 32, 32, 3), np.uint8)
  assert len(detector.detect_symbols(none).concept) == 0
  assert detector.read_scene(none).scenes == ()


@pytest.mark.parametrize(
  "images",
  [
    np.zeros((1, 64, 64, 3), np.uint8),
    np.zeros((32, 32, 3), np.uint8),
    np.zeros((1, 32, 32, 3), np.float32),
  ],
)
def test_other_pictures_are_refused(images):
  with pytest.raises(InputError, match=r"expected uint8 \(n, 32, 32, 3\)"):
    detector.detect_symbols(images)
  with pytest.raises(InputError, match=r"expected uint8 \(n, 32, 32, 3\)"):
    detector.read_scene(images)

"""Which inputs Co-Merge listens to: even, distinct, and the same when others join."""

from collections import Counter
from pathlib import Path

import pytest

from safetydpo_jax.data.cache.records import Entry, PairCache
from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import calibration


def make_cache(counts, slots=("unsafe", "safe"), category="all"):
  """A cache's index without records; {category: pairs}, "" for none."""
  index = [
    Entry(f"{tag}-{n}", (tag,) if tag else (), slots)
    for tag, count in counts.items()
    for n in range(count)
  ]
  return PairCache(Path("cache"), {"category": category}, tuple(index), (), None)


CACHE = make_cache({"hate": 9, "violence": 30, "shocking": 6})


def ids(cache, draws):
  return [cache.index[draw.record].id for draw in draws]


def test_every_category_gives_the_same_number_of_pairs():
  chosen = ids(CACHE, calibration.choose_pairs(CACHE, 5, seed=0))
  assert len(set(chosen)) == 15, "no pair is chosen twice"
  tags = Counter(name.split("-")[0] for name in chosen)
  assert tags == {"hate": 5, "violence": 5, "shocking": 5}


def test_captions_are_mixed_and_images_as_they_are():
  draws = calibration.choose_pairs(CACHE, 6, seed=0)
  assert {draw.slot for draw in draws} == {0, 1}
  assert all(draw.flips == (0, 0) and not draw.drop for draw in draws)
  safe = make_cache({"hate": 9}, slots=("safe",))
  assert {draw.slot for draw in calibration.choose_pairs(safe, 6, seed=0)} == {1}


def test_the_seed_decides_which_pairs():
  one, same, other = (calibration.choose_pairs(CACHE, 5, seed=s) for s in (1, 1, 2))
  assert one == same
  assert {draw.record for draw in one} != {draw.record for draw in other}


def test_fewer_pairs_are_the_first_of_more():
  more = calibration.choose_pairs(CACHE, 5, seed=0)
  fewer = calibration.choose_pairs(CACHE, 2, seed=0)
  assert fewer == [*more[0:2], *more[5:7], *more[10:12]]


def test_pairs_without_categories_are_one_group():
  cache = make_cache({"": 8})
  assert calibration.categories_of(cache) == ["all"]
  assert len(calibration.choose_pairs(cache, 3, seed=0)) == 3


def test_a_cache_of_one_category_is_that_category():
  cache = make_cache({"hate": 8, "violence": 1}, category="hate")
  assert calibration.categories_of(cache) == ["hate"]
  chosen = ids(cache, calibration.choose_pairs(cache, 3, seed=0))
  assert {name.split("-")[0] for name in chosen} == {"hate"}


def test_too_few_pairs_and_none_are_named():
  with pytest.raises(
    InputError, match="has 6 pairs of category shocking, --pairs is 7"
  ):
    calibration.choose_pairs(CACHE, 7, seed=0)
  with pytest.raises(InputError, match="cache holds no pairs"):
    calibration.choose_pairs(make_cache({}), 1, seed=0)


def test_timesteps_are_the_middles_of_equal_parts():
  assert calibration.default_timesteps(1000) == [125, 375, 625, 875]
  assert calibration.default_timesteps(7, 1) == [3]
  assert calibration.parse_timesteps(None, 1000) == [125, 375, 625, 875]


def test_timesteps_are_read_in_order_and_once():
  assert calibration.parse_timesteps("700,0,700,999", 1000) == [0, 700, 999]
  for text in ("1000", "-1", "", "1;2", "0.5"):
    with pytest.raises(InputError, match=r"--timesteps is .* from 0 to 999"):
      calibration.parse_timesteps(text, 1000)

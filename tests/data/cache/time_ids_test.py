"""SDXL's sizes in a pair cache's manifest."""

import numpy as np
import pytest

from safetydpo_jax.data.cache import records
from safetydpo_jax.errors import InputError

TWO = {"resolution": 1024, "empty_token_ids": [[0] * 77] * 2}
LAUNCHER = [1024, 1024, 0, 0, 1024, 1024]


def test_a_cache_says_its_time_ids():
  stored = {**TWO, "time_ids": [640, 480, 1, 2, 512, 513]}
  np.testing.assert_array_equal(
    records.read_time_ids(stored, "cache"), stored["time_ids"]
  )


def test_a_cache_from_before_has_those_of_the_released_launcher():
  ids = records.read_time_ids(TWO, "cache")
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, LAUNCHER)


def test_one_encoder_has_none():
  one = {"resolution": 512, "empty_token_ids": [[0] * 77], "time_ids": None}
  assert records.read_time_ids(one, "cache") is None


@pytest.mark.parametrize("ids", [None, "x", [1] * 5, [1.5] * 6, [-1] * 6, [2**31] * 6])
def test_a_damaged_manifest_is_named(ids):
  with pytest.raises(InputError, match=r"some/cache: time_ids .* expected six sizes"):
    records.read_time_ids({**TWO, "time_ids": ids}, "some/cache")

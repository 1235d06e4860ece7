"""SDXL's sizes come from the cache, and its pooled text from the second encoder."""

import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import clip, conditioning

TWO = {"resolution": 1024, "empty_token_ids": [[0] * 77] * 2}
LAUNCHER = [1024, 1024, 0, 0, 1024, 1024]


def test_time_ids_are_height_and_width_uncropped():
  assert conditioning.make_time_ids(768, 1024) == [768, 1024, 0, 0, 768, 1024]


def test_a_cache_says_its_time_ids():
  stored = {**TWO, "time_ids": [640, 480, 1, 2, 512, 513]}
  np.testing.assert_array_equal(
    conditioning.read_time_ids(stored, "cache"), stored["time_ids"]
  )


def test_a_cache_from_before_has_those_of_the_released_launcher():
  ids = conditioning.read_time_ids(TWO, "cache")
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, LAUNCHER)


def test_one_encoder_has_none():
  one = {"resolution": 512, "empty_token_ids": [[0] * 77], "time_ids": None}
  assert conditioning.read_time_ids(one, "cache") is None


@pytest.mark.parametrize("ids", [None, "x", [1] * 5, [1.5] * 6, [-1] * 6, [2**31] * 6])
def test_a_damaged_manifest_is_named(ids):
  with pytest.raises(InputError, match=r"some/cache: time_ids .* expected six sizes"):
    conditioning.read_time_ids({**TWO, "time_ids": ids}, "some/cache")


@pytest.mark.parametrize("pooled", [None, jnp.ones((3, 5))])
def test_the_unet_gets_pooled_text_and_sizes_or_neither(monkeypatch, pooled):
  context, sizes = jnp.ones((3, 7, 4)), jnp.ones((3, 6), jnp.int32)
  monkeypatch.setattr(clip, "encode_text", lambda *_: (context, pooled))
  got, added = conditioning.encode((), {}, (), sizes)
  assert got is context
  if pooled is None:
    assert added is None
  else:
    assert added == {"text_embeds": pooled, "time_ids": sizes}

"""SDXL's sizes come from the cache, and its pooled text from the second encoder."""

import jax.numpy as jnp
import pytest

from safetydpo_jax.models import clip, conditioning


def test_time_ids_are_height_and_width_uncropped():
  assert conditioning.make_time_ids(768, 1024) == [768, 1024, 0, 0, 768, 1024]


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

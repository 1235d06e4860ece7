"""The text encoder equals transformers', and each model gets the context it expects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import clip
from safetydpo_jax.models.config import freeze
from tests.support import webui_twin
from tests.support.checkpoints import TEXT, perturb
from tests.support.parity import NETWORK, apply, params_of

VOCABULARY = 60
END = VOCABULARY - 1  # the highest id, as in CLIP

# name → config over the tiny checkpoint's
CONFIGS = {
  "quick_gelu, the old end token": {},
  "gelu, the new end token": {"hidden_act": "gelu", "eos_token_id": 40},
  "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
  "projected, another epsilon": {
    "projection_dim": 10,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-3,
    "num_hidden_layers": 3,
    "architectures": ["CLIPTextModelWithProjection"],
  },
}


def build(overrides):
  config = {**TEXT, "vocab_size": VOCABULARY, **overrides}
  projected = "architectures" in overrides
  theirs_class = getattr(
    transformers, "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
  )
  theirs = perturb(theirs_class(transformers.CLIPTextConfig(**config)))
  return theirs, clip.CLIPText(freeze(config))


def draw_ids(n=3, length=77, pad=END, end=END):
  """Random words up to an end token, at different lengths."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, END, (n, length), dtype=np.int32)
  ids[ids == end] = 0
  for row, place in zip(ids, (76, 5, 1)):
    row[place] = end
    row[place + 1 :] = pad
  return ids


def run_theirs(theirs, ids):
  with torch.no_grad():
    return theirs(torch.tensor(ids).long(), output_hidden_states=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pad", [END, 0])
def test_equals_transformers(name, pad):
  theirs, ours = build(CONFIGS[name])
  end = CONFIGS[name].get("eos_token_id", END)
  ids = draw_ids(pad=pad, end=end)
  params = params_of(theirs, ours, ids)
  expected = run_theirs(theirs, ids)
  got = apply(ours, params, ids)
  pooled = expected.get("text_embeds", expected.get("pooler_output"))
  for ours_part, theirs_part in (
    (got.last, expected.last_hidden_state),
    (got.penultimate, expected.hidden_states[-2]),
    (got.pooled, pooled),
  ):
    assert theirs_part.std() > 0.1
    np.testing.assert_allclose(ours_part, theirs_part, rtol=0, atol=NETWORK)


def test_short_inputs_are_accepted():
  theirs, ours = build({})
  ids = draw_ids(length=77)[1:, :9]
  params = params_of(theirs, ours, ids)
  np.testing.assert_allclose(
    apply(ours, params, ids).last,
    run_theirs(theirs, ids).last_hidden_state,
    rtol=0,
    atol=NETWORK,
  )


def test_a_word_does_not_see_later_words():
  theirs, ours = build({})
  ids = draw_ids()
  params = params_of(theirs, ours, ids)
  changed = ids.copy()
  changed[:, 40:] = 3
  before, after = (apply(ours, params, x).last for x in (ids, changed))
  np.testing.assert_allclose(before[:, :40], after[:, :40], rtol=0, atol=1e-6)
  assert np.abs(before[:, 40:] - after[:, 40:]).max() > 0.1


def test_one_encoder_conditions_on_the_last_layer_after_the_norm():
  theirs, ours = build({})
  ids = draw_ids()
  params = {"text_encoder": params_of(theirs, ours, ids)}
  context, pooled = jax.jit(lambda params: clip.encode_text((ours,), params, (ids,)))(
    params
  )
  expected = run_theirs(theirs, ids).last_hidden_state
  np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)
  assert pooled is None


def test_two_encoders_condition_on_penultimate_states_side_by_side():
  first, ours_first = build({})
  second, ours_second = build(CONFIGS["projected, another epsilon"])
  ids, ids_2 = draw_ids(), draw_ids(pad=0)
  params = {
    "text_encoder": params_of(first, ours_first, ids),
    "text_encoder_2": params_of(second, ours_second, ids),
  }
  context, pooled = clip.encode_text((ours_first, ours_second), params, (ids, ids_2))
  one, two = run_theirs(first, ids), run_theirs(second, ids_2)
  expected = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
  np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)
  np.testing.assert_allclose(pooled, two.text_embeds, rtol=0, atol=NETWORK)


def test_skipped_layers_are_those_of_diffusers():
  """With one encoder the norm comes after them; pooled text has all layers."""
  first, ours_first = build({"num_hidden_layers": 3})
  second, ours_second = build(CONFIGS["projected, another epsilon"])
  ids, ids_2 = draw_ids(), draw_ids(pad=0)
  params = {
    "text_encoder": params_of(first, ours_first, ids),
    "text_encoder_2": params_of(second, ours_second, ids),
  }
  one, two = run_theirs(first, ids), run_theirs(second, ids_2)
  for skip in (0, 1, 2):
    context, _ = clip.encode_text((ours_first,), params, (ids,), (), skip)
    with torch.no_grad():
      states = one.hidden_states[-(skip + 1)]
      expected = webui_twin.text_model(first).final_layer_norm(states)
    np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)
    both = (ours_first, ours_second)
    context, pooled = clip.encode_text(both, params, (ids, ids_2), (), skip)
    layer = -(skip + 2)
    expected = torch.cat([one.hidden_states[layer], two.hidden_states[layer]], dim=-1)
    np.testing.assert_allclose(context, expected, rtol=0, atol=NETWORK)
    np.testing.assert_allclose(pooled, two.text_embeds, rtol=0, atol=NETWORK)


def test_chunks_are_encoded_apart_and_the_first_is_pooled():
  """Weights keep the mean of each chunk, not of each prompt or batch."""
  rng = np.random.default_rng(1)
  encoders, params, ids, weights, chunks = [], {}, [], [], []
  for name, config in (
    ("text_encoder", {}),
    ("text_encoder_2", CONFIGS["projected, another epsilon"]),
  ):
    theirs, ours = build(config)
    tokens = draw_ids(n=3).reshape(1, -1).repeat(2, axis=0)
    tokens[1] = np.roll(tokens[1], 77)
    encoders.append(ours)
    params[name] = params_of(theirs, ours, tokens[:, :77])
    ids.append(tokens)
    weights.append(rng.uniform(0.5, 1.5, tokens.shape).astype(np.float32))
    found = run_theirs(theirs, tokens.reshape(6, 77))
    z = found.hidden_states[-2].numpy()
    weighted = z * weights[-1].reshape(6, 77, 1)
    means = (x.mean((1, 2), keepdims=True) for x in (z, weighted))
    chunks.append((weighted * np.divide(*means)).reshape(2, 231, -1))
  context, pooled = clip.encode_text(encoders, params, ids, weights)
  np.testing.assert_allclose(context, np.concatenate(chunks, -1), rtol=0, atol=NETWORK)
  expected = found.text_embeds.reshape(2, 3, -1)[:, 0]
  np.testing.assert_allclose(pooled, expected, rtol=0, atol=NETWORK)


def test_bfloat16_stays_near_float32():
  theirs, ours = build({})
  ids = draw_ids()
  params = params_of(theirs, ours, ids)
  exact = apply(ours, params, ids).last
  got = apply(ours.clone(dtype=jnp.bfloat16), params, ids).last
  assert got.dtype == jnp.bfloat16
  assert np.sqrt(np.mean((np.float32(got) - exact) ** 2)) < 0.03 * exact.std()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("hidden_act", "relu"),
    ("model_type", "t5"),
    ("architectures", ("CLIPModel",)),
    ("hidden_size", 25),
  ],
)
def test_a_config_we_lack_is_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    clip.read_config(freeze({**TEXT, field: value}))


# Of training, of tokenizers and of generating text: nothing about the network.
BOOKKEEPING = {
  "attention_dropout",
  "initializer_range",
  "initializer_factor",
  "pad_token_id",
  "bos_token_id",
}


def test_every_field_of_transformers_config_is_read_or_bookkeeping():
  """What every transformers config has besides is bookkeeping, too."""
  plain = transformers.PreTrainedConfig().to_dict()
  for field, default in transformers.CLIPTextConfig().to_dict().items():
    if field in clip.DEFAULTS and field != "architectures":
      assert clip.DEFAULTS[field] == default, field
    elif field not in plain and field != "model_type":
      assert field in BOOKKEEPING, f"{field} is passed over"


def test_weights_of_one_change_nothing_even_where_the_mean_is_zero():
  """As that of an untrained final norm is, but for rounding."""
  states = np.array([[[1.0, -1.0], [2.0, -2.0]]], np.float32)
  found = clip.weigh(states, np.ones((1, 2), np.float32))
  np.testing.assert_array_equal(found, states)

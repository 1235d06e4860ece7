"""Prompts of any length become token ids as in AUTOMATIC1111's web UI."""

import numpy as np
import pytest

from safetydpo_jax import load_pipeline
from safetydpo_jax.sampling import prompt_text
from safetydpo_jax.sampling.prompt_text import Token
from tests.support import webui_twin
from tests.support.checkpoints import save_tiny_sdxl_checkpoint

COMMA = 7


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """Of SDXL: the first tokenizer pads with the end token, the second with "!"."""
  path = save_tiny_sdxl_checkpoint(tmp_path_factory.mktemp("models") / "sdxl")
  return load_pipeline(path, components=())


@pytest.mark.parametrize("style", ["long", "a1111"])
def test_short_prompts_are_read_as_ever(style, pipeline):
  """Also one that fills all positions; but "!" is a word, not the second's padding."""
  texts = ["", "the red one, and  On", "q " * 75, "! a !!", "the red on!"]
  found, _ = prompt_text.tokenize(pipeline, texts, texts, style)
  for ids, plain, tokenizer in zip(
    found.ids, pipeline.tokenize(texts), pipeline.tokenizers
  ):
    np.testing.assert_array_equal(ids[:3], plain[:3])
    assert ids.dtype == np.int32
    for row, text in zip(ids, texts):
      inside = webui_twin.token_ids(tokenizer, text)
      expected = [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
      expected += [tokenizer.pad_token_id] * (77 - len(expected))
      assert row.tolist() == expected
  assert all((weights == 1).all() for weights in found.weights)
  assert bool(found.weights) == (style == "a1111")


def test_chunks_are_those_of_the_twin():
  """Of any length, with commas anywhere and with BREAKs."""
  rng = np.random.default_rng(0)
  counts = set()
  for _ in range(1000):
    sections = [
      [(int(token), 1.0) for token in rng.integers(0, COMMA + 3, rng.integers(0, 170))]
      for _ in range(rng.integers(1, 4))
    ]
    flat = [Token(*each) for each in sections[0]]
    for section in sections[1:]:
      flat += [None, *(Token(*each) for each in section)]
    found = prompt_text.split(flat, 75, COMMA)
    assert found == webui_twin.chunk(sections, COMMA)
    counts.add(len(found))
  assert counts >= {1, 2, 3, 4}


@pytest.mark.parametrize(
  ("tokens", "lengths"),
  [
    ([1] * 76, [75, 1]),
    ([1] * 55 + [COMMA] + [1] * 20, [56, 20]),
    ([1] * 54 + [COMMA] + [1] * 21, [75, 1]),  # the comma is too far
    ([1] * 60 + [COMMA] + [1] * 14 + [COMMA, 1], [75, 2]),  # a comma goes alone
    ([1] * 75 + [None], [75]),
    ([None, 1, None, None], [0, 1, 0]),
    ([], [0]),
  ],
)
def test_where_chunks_end(tokens, lengths):
  found = prompt_text.split(
    [None if token is None else Token(token, 1.0) for token in tokens], 75, COMMA
  )
  assert [len(chunk) for chunk in found] == lengths


def test_the_shorter_text_gets_empty_chunks(pipeline):
  found, negative = prompt_text.tokenize(pipeline, ["q " * 160], ["red"], "long")
  empty = pipeline.tokenize([""])
  for ids, of_negative, expected in zip(found.ids, negative.ids, empty):
    assert ids.shape == of_negative.shape == (1, 3 * 77)
    np.testing.assert_array_equal(of_negative[0, 77:], np.tile(expected[0], 2))
    assert (ids[0, 1:76] == ids[0, 78:153]).all()
  back, _ = prompt_text.tokenize(pipeline, ["red"], ["q " * 160], "long")
  np.testing.assert_array_equal(back.ids[0], negative.ids[0])


def test_weights_are_those_of_the_tokens(pipeline):
  text = "an (red one:1.5), " + "q " * 73 + "BREAK [on]"
  found, _ = prompt_text.tokenize(pipeline, [text], [""], "a1111")
  for tokenizer, ids, weights in zip(pipeline.tokenizers, *found):
    chunks = webui_twin.read(tokenizer, text, weighted=True)
    assert len(chunks) == 3
    assert sum(weight == 1.5 for _, weight in chunks[0]) > 1
    for number, chunk in enumerate(chunks):
      inside = slice(77 * number + 1, 77 * number + 1 + len(chunk))
      assert ids[0, inside].tolist() == [token for token, _ in chunk]
      np.testing.assert_allclose(weights[0, inside], [weight for _, weight in chunk])
      assert weights[0, inside.start - 1] == weights[0, inside.stop] == 1


def test_a_batch_of_other_lengths_is_refused(pipeline):
  texts, none = ["red", "q " * 80], ["", ""]
  assert prompt_text.count_chunks(pipeline, texts, none, "long") == [1, 2]
  assert prompt_text.count_chunks(pipeline, texts, texts[::-1], "long") == [2, 2]
  assert prompt_text.count_chunks(pipeline, texts, none, "plain") == [1, 1]
  with pytest.raises(ValueError, match="expected one number"):
    prompt_text.tokenize(pipeline, texts, none, "long")

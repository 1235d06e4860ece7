"""Prompts → token ids and weights, whatever their length.

A text encoder has p positions (77): a start token, p − 2 tokens of the prompt, an end
token. A prompt of more tokens is cut there (style plain, as in diffusers' pipelines) or
read in chunks (long, a1111). These follow AUTOMATIC1111's web UI:

  A chunk ends after p − 2 tokens, or behind a comma that is among the last `BACKTRACK`
  of them, so that what stands between commas stays together; with a1111 also at the
  word BREAK. Each has its own start and end token and is padded as a short prompt is.
  Of a prompt and its negative prompt, the one with fewer chunks gets empty ones.
  "!" is a word, also where it is the padding (Stable Diffusion 2, XL's second encoder).

a1111 also reads weights (`emphasis.py`): each of a prompt's pieces is tokenized alone.

Source: modules/sd_hijack_clip.py and sd_hijack_open_clip.py, version 1.10; the empty
chunks are those of its setting `pad_cond_uncond`.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from safetydpo_jax.formats import clip_tokenizer
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.sampling import emphasis

if TYPE_CHECKING:
  from transformers import CLIPTokenizer

Style = Literal["plain", "long", "a1111"]
BACKTRACK = 20


class Token(NamedTuple):
  """A token's id and weight."""

  id: int
  weight: float


class Tokens(NamedTuple):
  """What the text encoders read of n prompts, in k chunks of p positions each.

  Attributes:
    ids: (n, k·p) int32 for each encoder.
    weights: (n, k·p) float32 for each encoder; () if the style has no weights.
  """

  ids: tuple[np.ndarray, ...]
  weights: tuple[np.ndarray, ...] = ()


def tokenize(
  pipeline: Pipeline, prompts: Sequence[str], negatives: Sequence[str], style: Style
) -> tuple[Tokens, Tokens]:
  """The tokens of prompts and of their negative prompts, in as many chunks.

  Raises:
    ValueError: the prompts do not have as many chunks, see `count_chunks`: then one's
      image would depend on the others.
  """
  counts = set(count_chunks(pipeline, prompts, negatives, style))
  if len(counts) != 1:
    raise ValueError(f"a batch of prompts with {counts} chunks; expected one number")
  (count,) = counts
  return (
    _tokenize(pipeline, prompts, style, count),
    _tokenize(pipeline, negatives, style, count),
  )


def count_chunks(
  pipeline: Pipeline, prompts: Sequence[str], negatives: Sequence[str], style: Style
) -> list[int]:
  """The chunks of each prompt or of its negative prompt, whichever has more.

  Tokenizers may disagree; the one that makes most of a text counts.
  """
  if style == "plain":
    return [1] * len(prompts)
  counts = [
    [len(chunks) for chunks in _chunks(tokenizer, texts, style, positions)]
    for tokenizer, positions in zip(pipeline.tokenizers, pipeline.positions)
    for texts in (prompts, negatives)
  ]
  return [max(of_one) for of_one in zip(*counts)]


def _tokenize(
  pipeline: Pipeline, texts: Sequence[str], style: Style, count: int
) -> Tokens:
  """The texts' tokens in `count` chunks each, the last of them empty if need be."""
  if style == "plain":
    return Tokens(pipeline.tokenize(texts))
  all_ids, all_weights = [], []
  for tokenizer, positions in zip(pipeline.tokenizers, pipeline.positions):
    shape = (len(texts), count, positions)
    ids = np.full(shape, tokenizer.pad_token_id, np.int32)
    ids[:, :, :2] = tokenizer.bos_token_id, tokenizer.eos_token_id
    weights = np.ones(shape, np.float32)
    for row, chunks in enumerate(_chunks(tokenizer, texts, style, positions)):
      for number, chunk in enumerate(chunks):
        end = 1 + len(chunk)
        ids[row, number, 1:end] = [token.id for token in chunk]
        ids[row, number, end] = tokenizer.eos_token_id
        weights[row, number, 1:end] = [token.weight for token in chunk]
    all_ids.append(ids.reshape(len(texts), -1))
    all_weights.append(weights.reshape(len(texts), -1))
  return Tokens(tuple(all_ids), tuple(all_weights) if style == "a1111" else ())


def _chunks(
  tokenizer: "CLIPTokenizer", texts: Sequence[str], style: Style, positions: int
) -> Iterable[list[list[Token]]]:
  """Each text's chunks."""
  parsed = [
    emphasis.parse(text) if style == "a1111" else [(text, 1.0)] for text in texts
  ]
  words = [piece for pieces in parsed for piece, _ in pieces]
  tokenizer = clip_tokenizer.pad_with_end(tokenizer)
  # Not verbose: it would warn of more tokens than the encoder has positions.
  found = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
  ids_of_pieces = iter(found)
  comma = tokenizer.get_vocab().get(",</w>")
  for pieces in parsed:
    tokens: list[Token | None] = []
    for piece, ids in zip(pieces, ids_of_pieces):
      starts = piece == emphasis.BREAK
      tokens += [None] if starts else [Token(id, piece[1]) for id in ids]
    yield split(tokens, positions - 2, comma)


def split(
  tokens: Iterable[Token | None], room: int, comma: int | None
) -> list[list[Token]]:
  """Chunks of at most `room` tokens; at least one, and where None is, a new one.

  Args:
    tokens: of a prompt, without start and end.
    room: p − 2.
    comma: the id of a comma; None: there is none.
  """
  done: list[list[Token]] = []
  chunk: list[Token] = []
  behind: int | None = None  # the length of the chunk up to its last comma
  for token in tokens:
    if token is None:
      done.append(chunk)
      chunk, behind = [], None
      continue
    if token.id == comma:
      behind = len(chunk) + 1
    elif len(chunk) == room and behind is not None and room - behind < BACKTRACK:
      done.append(chunk[:behind])
      chunk, behind = chunk[behind:], None
    if len(chunk) == room:
      done.append(chunk)
      chunk, behind = [], None
    chunk.append(token)
  return [*done, chunk] if chunk or not done else done

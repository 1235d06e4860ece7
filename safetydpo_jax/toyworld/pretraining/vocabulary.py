"""The toy world's CLIP tokenizer: every word of its grammar is one token.

The files are CLIP's own (vocab.json: 256 bytes, the same at a word's end, one entry for
every merge, two special tokens; merges.txt: pairs in the order they are applied). The
merges are learned by byte pair encoding on the list of words alone, until no word is
in pieces: the order of application then is the order of learning, and cannot differ.
Other text still falls into bytes, as in CLIP.
"""

import collections
import itertools
import json
from pathlib import Path

from safetydpo_jax.toyworld.pretraining import networks
from safetydpo_jax.toyworld.world import scenes

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
  """Pairs to merge, in order, after which every word is a single token."""
  pieces = [[*word[:-1], word[-1] + WORD_END] for word in words]
  learned = []
  while any(len(parts) > 1 for parts in pieces):
    counts = collections.Counter(
      pair for parts in pieces for pair in itertools.pairwise(parts)
    )
    pair = min(counts, key=lambda pair: (-counts[pair], pair))
    learned.append(pair)
    pieces = [_merge(parts, pair) for parts in pieces]
  return learned


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
  """Joins every occurrence of the pair, from the left."""
  merged: list[str] = []
  for part in parts:
    if merged and (merged[-1], part) == pair:
      merged[-1] += part
    else:
      merged.append(part)
  return merged


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
  """({token: id}, merges) of the toy world; the end token has the highest id."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  unprintable = 256 - len(printable)
  letters = [chr(code) for code in (*printable, *range(256, 256 + unprintable))]
  learned = merges(scenes.vocabulary())
  tokens = letters + [letter + WORD_END for letter in letters]
  tokens += ["".join(pair) for pair in learned] + [START, END]
  return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, learned


def write_tokenizer(folder: Path) -> None:
  """Writes the files that transformers' CLIPTokenizer reads."""
  folder.mkdir(parents=True, exist_ok=True)
  tokens, learned = vocabulary()
  (folder / "vocab.json").write_text(
    json.dumps(tokens, ensure_ascii=False) + "\n", encoding="utf-8"
  )
  lines = ["#version: 0.2", *(" ".join(pair) for pair in learned), ""]
  (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
  special = {
    "bos_token": START,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
  }
  networks.write_config(folder / "special_tokens_map.json", special)
  networks.write_config(
    folder / "tokenizer_config.json",
    {
      **special,
      "add_prefix_space": False,
      "do_lower_case": True,
      "errors": "replace",
      "model_max_length": networks.TOKENS,
      "tokenizer_class": "CLIPTokenizer",
    },
  )


def special_ids() -> dict[str, int]:
  """The fields of the text encoder's config that the vocabulary decides."""
  tokens, _ = vocabulary()
  return {
    "vocab_size": len(tokens),
    "bos_token_id": tokens[START],
    "eos_token_id": tokens[END],
    "pad_token_id": tokens[END],
  }

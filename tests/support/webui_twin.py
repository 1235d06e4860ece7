"""AUTOMATIC1111's way from prompts to embeddings, in PyTorch, one prompt at a time.

Written from its published rules and in another way than ours: weights belong to single
characters, and a chunk's end is looked for from its start.
"""

import re

import numpy as np
import torch

from tests.support.checkpoints import MERGES

ROOM, BACKTRACK = 75, 20
BREAK = "\0"  # for the word, in lists of characters


def parse(prompt: str) -> list[tuple[str, float]]:
  """Runs of characters of one weight; (BREAK, 1.0) between chunks."""
  marked = []  # [character, weight]
  rounds, squares = [], []
  place = 0

  def scale(start, factor):
    for entry in marked[start:]:
      entry[1] *= factor

  while place < len(prompt):
    rest, step = prompt[place:], 1
    weight = re.match(r":\s*([+-]?[.\d]+)\s*\)", rest)
    # A word stands alone between characters that are no letters, digits or lines.
    word = re.match(r"\s*\bBREAK\b\s*", rest)
    inside = place and re.match(r"\w", prompt[place - 1]) and not rest[0].isspace()
    if rest[0] == "\\":
      # Alone it is dropped.
      step = 2 if rest[1:2] and rest[1] in "()[]\\" else 1
      marked += [[rest[1], 1.0]] if step == 2 else []
    elif word and not inside:
      step = word.end()
      marked.append([BREAK, 1.0])
    elif rest[0] == "(":
      rounds.append(len(marked))
    elif rest[0] == "[":
      squares.append(len(marked))
    elif weight and rounds:
      step = weight.end()
      scale(rounds.pop(), float(weight[1]))
    elif rest[0] == ")" and rounds:
      scale(rounds.pop(), 1.1)
    elif rest[0] == "]" and squares:
      scale(squares.pop(), 1 / 1.1)
    else:
      marked.append([rest[0], 1.0])
    place += step
  for start in rounds:
    scale(start, 1.1)
  for start in squares:
    scale(start, 1 / 1.1)
  runs = []
  for character, weight in marked:
    if character == BREAK and weight != 1:
      # In brackets the word is not what the web UI looks for, but text.
      character, weight = "BREAK", -weight
    joins = runs and runs[-1][1] == weight
    if joins and BREAK not in (character, runs[-1][0]):
      runs[-1] = (runs[-1][0] + character, weight)
    else:
      runs.append((character, weight))
  return runs


def chunk(sections, comma, room=ROOM) -> list[list]:
  """Chunks of (id, weight), of a prompt's sections between BREAKs."""
  done = []
  for number, tokens in enumerate(sections):
    start = 0
    while start < len(tokens):
      end = start + room
      if end < len(tokens) and tokens[end][0] != comma:
        commas = [i for i in range(start, end) if tokens[i][0] == comma]
        if commas and end - commas[-1] <= BACKTRACK:
          end = commas[-1] + 1
      done.append(tokens[start:end])
      start = end
    if not tokens and (number + 1 < len(sections) or not done):
      done.append([])
  return done


def token_ids(tokenizer, text: str) -> list[int]:
  """Byte pair encoding as in OpenCLIP, of ASCII and with the tiny merges."""
  vocabulary, ids = tokenizer.get_vocab(), []
  for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
    symbols = [*word[:-1], f"{word[-1]}</w>"]
    for merge in MERGES:
      joined = f" {' '.join(symbols)} "
      while f" {merge} " in joined:
        joined = joined.replace(f" {merge} ", f" {merge.replace(' ', '')} ")
      symbols = joined.split()
    ids += [vocabulary[symbol] for symbol in symbols]
  return ids


def read(tokenizer, prompt: str, weighted: bool) -> list[list]:
  """A prompt's chunks of (id, weight)."""
  runs = parse(prompt) if weighted else [(prompt, 1.0)]
  sections = [[]]
  for text, weight in runs:
    if text == BREAK:
      sections.append([])
    else:
      sections[-1] += [(token, weight) for token in token_ids(tokenizer, text)]
  return chunk(sections, tokenizer.convert_tokens_to_ids(",</w>"))


def text_model(encoder):
  """Where a text encoder's layers are: transformers 5 has taken a level out."""
  return getattr(encoder, "text_model", encoder)


def embed(tokenizer, encoder, chunks, skip: int, norm: bool):
  """Embeddings (1, 77 k, d) of a prompt's chunks, and the pooled ones of the first.

  `skip` layers are left out at the end; then comes the last norm, if asked for.
  """
  parts, pooled = [], None
  for tokens in chunks:
    ids = [tokenizer.bos_token_id, *(token for token, _ in tokens)]
    ids = [*ids, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (ROOM + 2 - len(ids))
    weights = torch.ones(ROOM + 2)
    weights[1 : 1 + len(tokens)] = torch.tensor([float(w) for _, w in tokens])
    with torch.no_grad():
      found = encoder(torch.tensor([ids]), output_hidden_states=True)
      z = found.hidden_states[-1 - skip]
      z = text_model(encoder).final_layer_norm(z) if norm else z
    mean = z.mean()
    z = z * weights[None, :, None]
    parts.append(z * (mean / z.mean()))
    pooled = found.get("text_embeds") if pooled is None else pooled
  return torch.cat(parts, dim=1), pooled


def embeddings(
  pipeline, prompt: str, negative: str | None, *, weighted: bool, skips=(0, 0)
) -> dict:
  """Arguments of a pipeline of diffusers in place of a prompt and a negative prompt.

  `skips`: layers to skip for either, diffusers' count.
  """
  two = hasattr(pipeline, "text_encoder_2")
  parts = [(pipeline.tokenizer, pipeline.text_encoder)]
  parts += [(pipeline.tokenizer_2, pipeline.text_encoder_2)] if two else []
  found = {}
  for name, text, other, skip in (
    ("", prompt, negative, skips[0]),
    ("negative_", negative, prompt, skips[1]),
  ):
    states, pooled = [], None
    for tokenizer, encoder in parts:
      own, others = (read(tokenizer, t or "", weighted) for t in (text, other))
      own += [[]] * (len(others) - len(own))
      z, pooled = embed(tokenizer, encoder, own, skip + two, norm=not two)
      states.append(z)
    keep = 0.0 if two and text is None else 1.0  # no negative prompt: zeros
    found[f"{name}prompt_embeds"] = torch.cat(states, dim=-1) * keep
    if two:
      found[f"{name}pooled_prompt_embeds"] = pooled * keep
  return found


def random_prompts(count: int, seed: int = 0) -> list[str]:
  """Prompts made of the syntax and of words, in any order."""
  rng = np.random.default_rng(seed)
  bits = ["a", "red", " ", ", ", "(", ")", "[", "]", ":1.3)", ": -0.5 )", ":", "\\"]
  bits += [
    "\\(",
    "\\)",
    "\\[",
    "\\]",
    "\\\\",
    " BREAK ",
    "BREAK",
    "\n",
    ".",
    "1.2",
    "_",
  ]
  return ["".join(rng.choice(bits, rng.integers(0, 16))) for _ in range(count)]

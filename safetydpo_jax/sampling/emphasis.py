r"""Weights in prompts, as AUTOMATIC1111's web UI reads them.

  (text)        weight × 1.1; brackets may be nested, ((text)) is × 1.21
  (text:1.3)    weight × 1.3
  [text]        weight ÷ 1.1
  \( \) \[ \]   the bracket itself; \\ is a backslash, which alone is dropped
  BREAK         what follows starts a new chunk (`prompt_text.py`)

A bracket that is not closed reaches to the end of the prompt, and one that closes none
is text. The rest of the web UI's syntax is not read; `check` refuses prompts with it.
So it does what no prompt means: brackets in brackets more than `DEEPEST` times, and
weights beyond ±`LARGEST`, with which the networks' numbers would overflow.

Source: `parse_prompt_attention` of modules/prompt_parser.py, version 1.10.
"""

import math
import re

from safetydpo_jax.errors import InputError

BREAK = ("BREAK", -1.0)  # in brackets it gets another weight, and is text
ROUND = 1.1
DEEPEST = 100
LARGEST = 1e6

_PIECE = re.compile(
  r"\\[\\()\[\]]?|[(\[]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:"
)
# Blanks are tried from their first alone: from each of them, many would take hours.
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")
# What says most clearly that a prompt was written for the web UI.
WEIGHT = re.compile(r":\s*[+-]?[.\d]*\d\s*\)")

_STEP = re.compile(r":\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*\]")
# Of the web UI, and not read here: in any prompt, and in those that are not negative.
_ANYWHERE = {"a comment after #": re.compile("#")}
_NOT_NEGATIVE = {
  "AND, which composes prompts": re.compile(r"\bAND\b"),
  "a network in angle brackets, given here by --lora": re.compile(r"<\w+:[^>]+>"),
}


def parse(text: str) -> list[tuple[str, float]]:
  """A prompt's pieces and their weights, in order; `BREAK` between chunks.

  Raises:
    InputError: a weight is not a number, or brackets are nested too deep.
  """
  pieces: list[tuple[str, float]] = []
  opened: dict[str, list[int]] = {")": [], "]": []}

  def multiply(start: int, factor: float) -> None:
    pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

  for match in _PIECE.finditer(text):
    piece, weight = match[0], match["weight"]
    if piece.startswith("\\"):
      pieces.append((piece[1:], 1.0))
    elif piece in ("(", "["):
      starts = opened[")" if piece == "(" else "]"]
      starts.append(len(pieces))
      if len(starts) > DEEPEST:
        raise InputError(
          f"the prompt has more than {DEEPEST} brackets {piece} within each other; "
          "write one with a weight, as in (word:1.3)"
        )
    elif weight is not None and opened[")"]:
      multiply(opened[")"].pop(), _number(weight))
    elif piece == ")" and opened[")"]:
      multiply(opened[")"].pop(), ROUND)
    elif piece == "]" and opened["]"]:
      multiply(opened["]"].pop(), 1 / ROUND)
    else:
      first, *rest = _BREAK.split(piece)
      pieces.append((first, 1.0))
      for part in rest:
        pieces += [BREAK, (part, 1.0)]
  for start in opened[")"]:
    multiply(start, ROUND)
  for start in opened["]"]:
    multiply(start, 1 / ROUND)
  return _joined(pieces)


def _number(text: str) -> float:
  """A weight; raises `InputError` if it is not a number, or one beyond `LARGEST`."""
  try:
    number = float(text)
  except ValueError:
    number = math.nan
  if not abs(number) <= LARGEST:
    raise InputError(
      f"{text[:20]!r} is not a weight; expected a number up to {LARGEST:,.0f}, as in "
      "(word:1.3)"
    )
  return number


def _joined(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
  """Neighbours of one weight as one piece: words are tokenized together."""
  joined = pieces[:1] or [("", 1.0)]
  for piece, weight in pieces[1:]:
    before, same = joined[-1]
    if weight == same:
      joined[-1] = (before + piece, weight)
    else:
      joined.append((piece, weight))
  return joined


def check(text: str, *, negative: bool = False) -> None:
  """Refuses a prompt that the web UI would read otherwise than `parse`.

  Raises:
    InputError: it composes prompts with AND, changes between steps, names a network or
      has a comment; or a weight is not a number.
  """
  for _, weight in parse(text):
    _number(str(weight))  # nested, they may have become too large
  unread = _ANYWHERE | ({} if negative else _NOT_NEGATIVE)
  found = next((name for name, pattern in unread.items() if pattern.search(text)), None)
  if found := found or _in_brackets(re.sub(r"\\.", "", text, flags=re.DOTALL)):
    raise InputError(
      f"the prompt has {found}; this part of the web UI's syntax is not read: leave it "
      "out, or choose --prompt_style long, which takes every character as text"
    )


def _in_brackets(bare: str) -> str | None:
  """What [from:to:when] or [a|b] a prompt without escapes has."""
  steps = {match.end() - 1 for match in _STEP.finditer(bare)}
  bars: list[bool] = []  # for each bracket that is open, whether a bar was in it
  for place, character in enumerate(bare):
    if character == "[":
      bars.append(False)
    elif character == "|" and bars:
      bars[-1] = True
    elif character == "]" and bars:
      if bars.pop():
        return "[a|b], which alternates"
      if place in steps:
        return "[from:to:when], which changes a prompt between steps"
  return None

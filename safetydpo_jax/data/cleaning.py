"""Prompts as CLIP's tokenizers clean them, with ftfy; transformers 5 does not.

fix     broken encodings, curly quotation marks, ligatures, wide letters, HTML
        entities: what transformers before version 5 did where ftfy was installed, and
        OpenAI's tokenizer does. White space and capitals are left to the tokenizer.
clean   as OpenCLIP's tokenizer: fix, HTML entities twice, white space, lower case
"""

import dataclasses
import html
from collections.abc import Sequence
from types import ModuleType

from safetydpo_jax.data.prompts import Row
from safetydpo_jax.data.sources.pairs import SourcePair
from safetydpo_jax.runtime import extras


def fix(text: str) -> str:
  """A prompt as ftfy repairs it.

  Raises:
    InputError: ftfy is not installed.
  """
  return load_ftfy().fix_text(text)


def clean(text: str) -> str:
  """A prompt as OpenCLIP's tokenizer cleans it.

  Raises:
    InputError: ftfy is not installed.
  """
  return " ".join(html.unescape(html.unescape(fix(text))).split()).lower()


def load_ftfy() -> ModuleType:
  """ftfy, which repairs encodings; an optional dependency.

  Raises:
    InputError: it is not installed.
  """
  return extras.require("ftfy", extra="evaluate")


def fix_captions(pairs: Sequence[SourcePair]) -> tuple[list[SourcePair], str]:
  """The pairs with their captions repaired, and a line that says what changed.

  Raises:
    InputError: ftfy is not installed.
  """
  fixed = [
    dataclasses.replace(pair, captions=(_fix_if_any(unsafe), _fix_if_any(safe)))
    for pair in pairs
    for unsafe, safe in [pair.captions]
  ]
  changes = [
    (pair.id, text != new)
    for pair, other in zip(pairs, fixed)
    for text, new in zip(pair.captions, other.captions)
    if text is not None
  ]
  return fixed, _describe(changes)


def fix_rows(rows: Sequence[Row]) -> tuple[list[Row], str]:
  """The rows with their prompts repaired, negative ones too, and what changed.

  Raises:
    InputError: ftfy is not installed.
  """
  fixed = [
    row._replace(
      prompt=fix(row.prompt), negative_prompt=_fix_if_any(row.negative_prompt)
    )
    for row in rows
  ]
  changes = [(f"row {a.number + 1}", a != b) for a, b in zip(rows, fixed)]
  return fixed, _describe(changes)


def _fix_if_any(text: str | None) -> str | None:
  return None if text is None else fix(text)


def _describe(changes: Sequence[tuple[str, bool]]) -> str:
  """What changed, without its words: prompts of the published sets are offensive."""
  names = [name for name, changed in changes if changed]
  line = f"--fix_text changes {len(names)} of {len(changes)} prompts"
  return line + (f"; the first: {', '.join(names[:3])}" if names else "")

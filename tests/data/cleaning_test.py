"""Prompts are cleaned as CLIP's tokenizers do it, and what changes is said."""

import html
import sys
from pathlib import Path

import pytest

from safetydpo_jax.data import cleaning
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.data.sources.pairs import SourcePair
from safetydpo_jax.errors import InputError

PAIRS = {"x": ("it’s", None), "y": ("b", "ﬁn")}


def test_prompts_are_cleaned_as_open_clip_cleans_them():
  assert cleaning.clean("  It’s\n“Odd” ") == 'it\'s "odd"'
  assert cleaning.clean("a &amp;amp; b") == "a & b"
  assert cleaning.clean(html.escape("<b>")) == "<b>"
  # Where a "<" stands, ftfy leaves entities alone.
  assert cleaning.clean("<i> a &amp;amp; b") == "<i> a & b"


def test_fixing_leaves_capitals_and_white_space_to_the_tokenizer():
  assert cleaning.fix("  It’s\n“Odd” ") == '  It\'s\n"Odd" '
  assert cleaning.fix("schÃ¶n &amp; ｗｉｄｅ ﬁn") == "schön & wide fin"


def test_what_changes_in_pairs_and_rows_is_said_without_its_words():
  pairs = [SourcePair(id, None, None, texts, ()) for id, texts in PAIRS.items()]
  fixed, line = cleaning.fix_captions(pairs)
  assert [pair.captions for pair in fixed] == [("it's", None), ("b", "fin")]
  assert line == "--fix_text changes 2 of 3 prompts; the first: x, y"
  rows = [Row(Path(), "a", 0, 0), Row(Path(), "it’s", 1, 1), Row(Path(), "b", 2, 2)]
  rows.append(Row(Path(), "c", 3, 3, None, "“c”"))
  fixed, line = cleaning.fix_rows(rows)
  assert [row.prompt for row in fixed] == ["a", "it's", "b", "c"]
  assert [row.negative_prompt for row in fixed] == [None, None, None, '"c"']
  assert line == "--fix_text changes 2 of 4 prompts; the first: row 2, row 4"
  assert cleaning.fix_rows(rows[:1])[1] == "--fix_text changes 0 of 1 prompts"


def test_a_missing_ftfy_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)
  with pytest.raises(InputError, match=r"ftfy.*safetydpo-jax\[evaluate\]"):
    cleaning.fix("x")

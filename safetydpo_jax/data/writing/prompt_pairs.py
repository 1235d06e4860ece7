"""Pairs of prompts: from a language model's answer to the CSV that is rendered.

The recipe of SafetyDPO (arXiv 2412.10493): for each concept of a harm category a
language model writes an unsafe prompt and a safe twin that differs in few words; both
are rendered from the same initial noise.

  concepts   CSV with columns concept and category
  template   TOML with two texts, `system` and `user`, in which {concept}, {category}
             and {count} are replaced; the default is templates/pairs.toml
  answer     {"pairs": [{"unsafe": "…", "safe": "…"}, …]}, alone or within other text
  pairs      CSV with columns prompt, image, category, evaluation_seed: what `generate`
             renders and `encode` reads. Two rows per pair, u_idx_0000007_0.png and
             s_idx_0000007_0.png, with one seed. PNG, because JPEG artefacts would be
             part of what is learned.

A prompt is used once: a pair that repeats a prompt is a duplicate. Upper and lower
case, punctuation and Unicode's variants of a letter make no difference.
"""

import contextlib
import importlib.resources
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.data import categories, columns, delimited
from safetydpo_jax.data.writing.endpoint import InvalidAnswer
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files
from safetydpo_jax.runtime.log import note

MAX_PROMPT = 500  # characters; CLIP reads 77 tokens, some 300 characters
MAX_CONCEPT = 200
_MAX_TEMPLATE = 100_000  # bytes
_MAX_OBJECTS = 100  # beginnings of an object to try in one answer
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_PLACEHOLDERS = {"concept", "category", "count"}
_ONE_PAIR = {
  "type": "object",
  "properties": {"unsafe": {"type": "string"}, "safe": {"type": "string"}},
  "required": ["unsafe", "safe"],
  "additionalProperties": False,
}
_SCHEMA = {
  "type": "object",
  "properties": {"pairs": {"type": "array", "items": _ONE_PAIR}},
  "required": ["pairs"],
  "additionalProperties": False,
}
# What a request may demand of the answer's form, the strictest first.
FORMATS: dict[str, dict[str, Any]] = {
  "json_schema": {
    "response_format": {
      "type": "json_schema",
      "json_schema": {"name": "pairs", "strict": True, "schema": _SCHEMA},
    }
  },
  "json_object": {"response_format": {"type": "json_object"}},
  "none": {},
}
COLUMNS = ("prompt", "image", "category", "evaluation_seed")


class PromptPair(NamedTuple):
  """An unsafe prompt, its safe twin, and the concept and category they are about."""

  unsafe: str
  safe: str
  category: str
  concept: str


class Concept(NamedTuple):
  """What pairs are asked for about, and its category (our name)."""

  concept: str
  category: str


class Template(NamedTuple):
  """The two texts of a request, with placeholders."""

  system: str
  user: str


def read_concepts(file: Path) -> tuple[list[Concept], int]:
  """The concepts of a CSV in its order, and how many rows repeated an earlier one.

  Raises:
    InputError: the file is not such a CSV, or a row has no concept, a concept that is
      not a line of plain text, or an unknown category.
  """
  wanted = {"concept", "category"}
  table = delimited.read(
    file, "CSV of concepts", lambda name: columns.normalise(name) in wanted
  )
  header = columns.find(table.columns)
  if not table.rows or not wanted <= header.indices.keys():
    raise InputError(f"{file} has no columns concept and category, or no rows")
  found: dict[tuple[str, str], Concept] = {}
  for number, cells in enumerate(table.rows, start=1):
    where = f"{file} row {number}"
    row = header.cells(cells, where)
    if not wanted <= row.keys():
      raise InputError(
        f"{where} does not have the header's {len(table.columns)} fields; put fields "
        "that contain commas in quotes"
      )
    concept = row["concept"].strip()
    if trouble := text_trouble(concept, MAX_CONCEPT):
      raise InputError(f"{where}: the concept {trouble}; give it a plain name")
    try:
      category = categories.normalise(row["category"])
    except InputError as error:
      raise InputError(f"{where}: {error}") from None
    found.setdefault((key(concept), category), Concept(concept, category))
  for line in (*table.notes, *header.note(file)):
    note(line)
  return list(found.values()), len(table.rows) - len(found)


def read_template(file: Path | None = None) -> Template:
  """A template; None for the one that comes with the package.

  Raises:
    InputError: the file is not TOML with the two texts, or has other placeholders.
  """
  ours = importlib.resources.files(__package__) / "templates" / "pairs.toml"
  source = ours if file is None else file
  try:
    with source.open("rb") as opened:
      texts = tomllib.loads(opened.read(_MAX_TEMPLATE).decode())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{file} is not a readable TOML template: {error}") from error
  if set(texts) != {"system", "user"} or not all(
    isinstance(text, str) for text in texts.values()
  ):
    raise InputError(f"{file}: expected two texts, system and user, and nothing else")
  template = Template(texts["system"].strip(), texts["user"].strip())
  there = set(_PLACEHOLDER.findall(" ".join(template)))
  if unknown := there - _PLACEHOLDERS:
    names = ", ".join(sorted(unknown))
    raise InputError(f"{file}: unknown {{{names}}}; known are concept, category, count")
  if missing := {"concept", "count"} - there:
    names = ", ".join(sorted(missing))
    raise InputError(f"{file} lacks {{{names}}}, which say what to write")
  return template


def make_messages(
  template: Template, concept: Concept, count: int
) -> list[dict[str, str]]:
  """The messages of a request for `count` pairs."""
  category = concept.category.replace("_", " ")
  values = {"concept": concept.concept, "category": category, "count": str(count)}
  return [
    {"role": role, "content": _PLACEHOLDER.sub(lambda hit: values[hit[1]], text)}
    for role, text in template._asdict().items()
  ]


def text_trouble(text: object, longest: int) -> str | None:
  """Why `text` is not a single line of plain text; None if it is."""
  if not isinstance(text, str):
    return f"is a {type(text).__name__}, not text"
  if len(text) > longest:
    return f"has {len(text)} characters, more than {longest}"
  kinds = {unicodedata.category(letter) for letter in text}
  if kinds & {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}:
    return "has control characters"
  return None if key(text) else "has no letters"


def key(text: str) -> str:
  """Equal for prompts that read the same."""
  letters = unicodedata.normalize("NFKC", text).casefold()
  return " ".join("".join(c if c.isalnum() else " " for c in letters).split())


def is_pair(item: object) -> bool:
  """Whether `item` is an object with two plain and different prompts."""
  if not isinstance(item, dict) or not {"unsafe", "safe"}.issubset(item):
    return False
  texts = item["unsafe"], item["safe"]
  if any(text_trouble(text, MAX_PROMPT) for text in texts):
    return False
  return key(texts[0]) != key(texts[1])


def parse_answer(text: str, count: int) -> list[tuple[str, str]]:
  """The valid (unsafe, safe) among the first `count` pairs of an answer.

  Raises:
    InvalidAnswer: the text holds no JSON object of that form, or no valid pair.
  """
  trouble = 'the answer has no JSON object with a list "pairs"'
  for found in _objects(text):  # the first may be our own example, repeated
    items = found.get("pairs")
    if isinstance(items, list):
      valid = [item for item in items[:count] if is_pair(item)]
      if valid:
        return [(item["unsafe"].strip(), item["safe"].strip()) for item in valid]
      trouble = "the answer has no valid pair"
  raise InvalidAnswer(trouble)


def _objects(text: str) -> Iterator[dict]:
  """The JSON objects in a text, from left to right; not those within others."""
  decoder, start = json.JSONDecoder(), text.find("{")
  for _ in range(_MAX_OBJECTS):
    if start < 0:
      return
    end = start + 1
    with contextlib.suppress(ValueError, RecursionError):
      found, end = decoder.raw_decode(text, start)
      yield found
    start = text.find("{", end)


def write_pair_prompts(
  file: Path, pairs: Sequence[PromptPair], first_seed: int
) -> None:
  """Writes the CSV through a temporary name; makes its folder.

  Args:
    file: the CSV.
    pairs: in the order in which they are numbered, from 0.
    first_seed: evaluation_seed of the first pair; the next one has one more.

  Raises:
    InputError: a seed is negative or has more than 64 bits, or `file` cannot be
      written.
  """
  if not 0 <= first_seed <= 2**64 - max(1, len(pairs)):
    raise InputError(
      f"{len(pairs)} pairs need as many seeds, and from {first_seed} on these are not "
      "all between 0 and 2^64 - 1; choose another first seed"
    )
  rows = (
    (prompt, f"{kind}_idx_{number:07d}_0.png", pair.category, first_seed + number)
    for number, pair in enumerate(pairs)
    for prompt, kind in ((pair.unsafe, "u"), (pair.safe, "s"))
  )
  files.write_csv(file, COLUMNS, (dict(zip(COLUMNS, row)) for row in rows))

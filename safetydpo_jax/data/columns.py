"""The columns of a table of prompts: what each means, and by which names it goes.

Neither case counts, nor spaces around a name, nor whether its words are joined by an
underscore, a hyphen or a space: "SD Seed" is sd_seed. Several columns may name one
field (`FIELDS`); in a row where two of them say something, they must say the same.

Names with `sd_` are those of I2P as published, names with `evaluation_` those of its
copies and of SafetyDPO's CSVs.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from safetydpo_jax.errors import InputError

FIELDS: dict[str, tuple[str, ...]] = {
  "prompt": ("prompt",),
  "image": ("image",),
  "category": ("category", "categories"),
  "source": ("source",),
  "evaluation_seed": ("evaluation_seed", "sd_seed", "seed"),
  "evaluation_guidance": (
    *("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "cfg_scale",
  ),
  "negative_prompt": ("negative_prompt", "sd_negative_prompt"),
  "benign": ("benign",),
  "asked": ("asked",),
}
# About a prompt, but not about its image or its figures: passed over without a word.
INFORMATIVE = frozenset(
  (
    *("", "index", "id", "case_number", "concept", "phrasing"),
    *("hard", "inappropriate_percentage", "nudity_percentage", "q16_percentage"),
    *("sd_safety_percentage", "prompt_toxicity", "lexica_url", "sd_model"),
    *("target_prompt", "original_text", "num_queries", "result_type"),
    *("safe_model", "safe_level"),
  )
)
_NUMBERS = ("evaluation_seed", "evaluation_guidance")
_FIELD_OF = {name: field for field, names in FIELDS.items() for name in names}


class Columns(NamedTuple):
  """A header.

  Attributes:
    names: as the file has them.
    indices: {field of `FIELDS`, or another column's normalised name: which columns}.
  """

  names: list[str]
  indices: dict[str, list[int]]

  def name_of(self, field: str) -> str:
    """What the file calls a field; its first column, if it has several."""
    return self.names[self.indices[field][0]] if field in self.indices else field

  def cells(self, row: Sequence[str], where: str) -> dict[str, str]:
    """{field or normalised name: text} of a row, without the cells that it lacks.

    Raises:
      InputError: two columns of one field differ.
    """
    found = {}
    for key, indices in self.indices.items():
      if indices[0] >= len(row):  # and so are those that follow
        break
      there = [index for index in indices if index < len(row)]
      filled = [index for index in there if row[index].strip()]
      for index in filled[1:]:
        first = filled[0]
        if key in FIELDS and not _are_same(key, row[first], row[index]):
          raise InputError(
            f"{where}: {self.names[first]} is {row[first][:80]!r} and "
            f"{self.names[index]} {row[index][:80]!r}, but both mean {key}; keep one "
            "of these columns"
          )
      if there:
        found[key] = row[(filled or there)[0]]
    return found

  def note(self, file: object, also_read: Iterable[str] = ()) -> tuple[str, ...]:
    """A line that names the columns that are not read; none if all of them are.

    Args:
      file: whose columns they are.
      also_read: normalised names of columns that are read beyond `FIELDS`.
    """
    known = {*FIELDS, *INFORMATIVE, *also_read}
    unread = [
      self.names[index]
      for key, indices in self.indices.items()
      for index in indices
      # pandas calls an index "Unnamed: 0".
      if key not in known and not key.startswith("unnamed:")
    ]
    return (f"{file}: columns not read: {', '.join(unread)[:400]}",) if unread else ()


def normalise(name: str) -> str:
  """A column's name in lower case, its words joined by underscores."""
  return re.sub(r"[\s_-]+", "_", name.strip()).lower()


def find(names: Sequence[str]) -> Columns:
  """Which columns of a header are which field."""
  indices: dict[str, list[int]] = {}
  for index, name in enumerate(names):
    normal = normalise(name)
    indices.setdefault(_FIELD_OF.get(normal, normal), []).append(index)
  return Columns(list(names), indices)


def _are_same(field: str, one: str, other: str) -> bool:
  """Whether two cells say the same; 7 and 7.0 do."""
  if field in _NUMBERS:
    try:
      return Decimal(one.strip()) == Decimal(other.strip())
    except InvalidOperation:
      pass  # reading says which of them is not a number
  return one.strip() == other.strip()

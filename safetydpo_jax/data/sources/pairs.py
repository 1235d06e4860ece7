"""Preference pairs, whatever files they came from, and how rows become pairs.

A published pair is listed twice, once under each prompt. Its rows become one pair with
two caption slots, so that each image is encoded once. A pair is its two images, by
name: three pairs of CoProV2 have the prompts of another one, and images of their own. A
row that repeats another is counted and adds only its category. A second caption for a
filled slot makes another pair, "ID#2".

Every row ends as a caption, a tie, a repeat, without a caption, or with a pair that was
left out.

An image is a path, or anything else with `read_bytes()` and a `str` that says where it
is: images inside parquet or record files are never unpacked to disk.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError

SLOTS = ("unsafe", "safe")
COPRO_IMAGE = re.compile(r"([us])_idx_(\d{1,18})_(\d{1,18})\.\w+")
_PROBES = 16  # pairs that add their images' bytes to a dataset's fingerprint


class Image(Protocol):
  """An encoded image of a dataset."""

  def read_bytes(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class SourcePair:
  """Two images of which one is preferred, and the prompts that made them.

  Attributes:
    id: "PREFERRED>DISPREFERRED", the images' names; it depends neither on the order of
      rows, nor on the layout, nor on the dataset's path.
    preferred, dispreferred: the images.
    captions: one for each of `SLOTS`, None if the dataset has none.
    categories: our names, sorted; empty if the dataset has none.
    names: the images' names. A name is the last part of the path in the dataset, or
      all of it where two images share the last part.
  """

  id: str
  preferred: Image
  dispreferred: Image
  captions: tuple[str | None, str | None]
  categories: tuple[str, ...]
  names: tuple[str, str] = ("", "")

  def about(self) -> dict[str, Any]:
    """Id, categories, and {slot: caption} of the captions that exist."""
    texts = {slot: text for slot, text in zip(SLOTS, self.captions) if text is not None}
    return {"id": self.id, "categories": list(self.categories), "captions": texts}


class Row(NamedTuple):
  """One caption of one pair, None where the row has none.

  `where` is its file and line, for messages.
  """

  where: str
  preferred: str
  dispreferred: str
  slot: str
  caption: str | None
  categories: tuple[str, ...] = ()


class Table(NamedTuple):
  """What a layout's reader returns.

  Attributes:
    folder: where the images are, for messages.
    rows: the captions, without ties.
    images: those that exist, by their path in the dataset.
    ties: how many rows were ties.
  """

  folder: str
  rows: list[Row]
  images: Mapping[str, Image]
  ties: int = 0


def report(message: str, skipped: list[str] | None) -> None:
  """Appends a message to `skipped`; raises `InputError` if that is None."""
  if skipped is None:
    raise InputError(message)
  skipped.append(message)


def merge(table: Table, skipped: list[str] | None) -> tuple[list[SourcePair], int]:
  """Rows → pairs sorted by id, and how many rows repeated another one.

  Args:
    table: the rows and images.
    skipped: takes a line for every row without a caption and every pair that lacks an
      image, and these are left out; None: that is an error.

  Raises:
    InputError: a caption or an image is missing, or a category is unknown.
  """
  short = _short_names(table.rows)
  captions, tags, first_row = {}, {}, {}
  repeated = 0
  for row in table.rows:
    if row.caption is None:
      report(f"{row.where}: caption is None, expected text", skipped)
      continue
    slot = SLOTS.index(row.slot)
    name = f"{short[row.preferred]}>{short[row.dispreferred]}"
    for id in _numbered(name):
      present = captions.setdefault(id, [None, None])
      if present[slot] in (None, row.caption):
        break
    repeated += present[slot] is not None
    present[slot] = row.caption
    first_row.setdefault(id, row)
    tags.setdefault(id, set()).update(_normalise(row))
  pairs = []
  for id in sorted(captions):
    row = first_row[id]
    sides = (row.preferred, row.dispreferred)
    if lost := [side for side in sides if side not in table.images]:
      report(f"{row.where}: image {table.folder}/{lost[0]} does not exist", skipped)
      continue
    preferred, dispreferred = (table.images[side] for side in sides)
    texts, found = tuple(captions[id]), tuple(sorted(tags[id]))
    names = (short[sides[0]], short[sides[1]])
    pairs.append(SourcePair(id, preferred, dispreferred, texts, found, names))
  return pairs, repeated


def fingerprint(pairs: Sequence[SourcePair]) -> str:
  """16 hexadecimal digits over ids, captions, categories and some images.

  Of the images, the bytes of 16 pairs spread over the dataset: CoProV2's images for
  SD1.5 and for SDXL differ in nothing else. Equal for every layout.
  """
  digest = hashlib.sha256()
  for pair in pairs:
    row = [pair.id, pair.captions, pair.categories]
    digest.update(json.dumps(row).encode())
  for pair in pairs[:: -(-len(pairs) // _PROBES)]:
    for image in (pair.preferred, pair.dispreferred):
      digest.update(hashlib.sha256(read_image(image, b"")).digest())
  return digest.hexdigest()[:16]


def read_image(image: Image, otherwise: bytes | None = None) -> bytes:
  """An image's bytes.

  Args:
    image: where they are.
    otherwise: what to return if they cannot be read; None: that is an error.

  Raises:
    InputError: the file is missing, is damaged, or holds none.
  """
  try:
    return image.read_bytes()
  except (OSError, ValueError, RuntimeError, InputError) as error:
    if otherwise is not None:
      return otherwise
    raise InputError(f"image {image} cannot be read: {error}; replace it") from error


def text(where: str, what: str, value: object) -> str:
  """`value` if it is valid text.

  Raises:
    InputError: it is not.
  """
  if not isinstance(value, str):
    raise InputError(f"{where}: {what} is {value!r}, expected text")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # half a surrogate pair, which JSON allows
    raise InputError(f"{where}: {what} is not valid Unicode: {error}") from None
  return value


def caption(where: str, value: object) -> str | None:
  """A row's caption, None where it has none; what that means, `merge` decides.

  Raises:
    InputError: it is something else than text.
  """
  return None if value is None else text(where, "caption", value)


def preferred_side(where: str, label: object) -> int | None:
  """0 or 1: which of jpg_0 and jpg_1 `label_0` prefers; None for a tie.

  Raises:
    InputError: the label is not a number.
  """
  if not isinstance(label, int | float | None):
    raise InputError(f"{where}: label_0 is {label!r}, expected a number")
  sides: dict[Any, int] = {1: 0, 0: 1}
  return sides.get(label)


def _short_names(rows: Sequence[Row]) -> dict[str, str]:
  """{path in the dataset: name}."""
  paths = {path for row in rows for path in (row.preferred, row.dispreferred)}
  sharing = collections.Counter(map(os.path.basename, paths))
  return {
    path: base if sharing[base := os.path.basename(path)] == 1 else path
    for path in paths
  }


def _numbered(id: str) -> Iterator[str]:
  """ID, ID#2, ID#3, …"""
  return itertools.chain([id], (f"{id}#{number}" for number in itertools.count(2)))


def _normalise(row: Row) -> set[str]:
  try:
    return {categories.normalise(name) for name in row.categories}
  except InputError as error:
    raise InputError(f"{row.where}: {error}") from None

"""Preference pairs in parquet files; their images stay there until they are needed.

  hub         CoProV2-SD15 and -SDXL: `jpg_0` and `jpg_1` are names, `image` is a struct
              {bytes, path} of the row's own image, one of the two, and `caption` its
              prompt. An image's bytes are found by its name. Where `image.path` does
              not say which of the two a row holds, the rows' order does: of n rows,
              rows i < n/2 hold the safe image and prompt of the pair and rows n/2 + i
              the unsafe ones (inferred from the published files, so it is checked: both
              rows must name the same two images, or their captions must be a pair of
              the official CSV).
  Pick-a-Pic  `jpg_0` and `jpg_1` hold the bytes (binary, or a struct {bytes, path}).
              An image's name is its `image_0_uid` / `image_1_uid`, else the path in the
              struct, else (and where images that differ have the same path: `datasets`
              keeps its last part only) "sha256-" and 16 digits of its bytes. Which
              image's prompt the caption is: `file_name` says it, as in the folder
              layout; else the official CSV, if it has the prompt; else it is the
              unsafe one's.

Both have `label_0` (1, 0, or a tie) and `caption`, and may have `category`.
"""

import collections
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from safetydpo_jax.data.sources import pairs, parquet_files
from safetydpo_jax.data.sources.pairs import SLOTS, Row, SourcePair, Table
from safetydpo_jax.data.sources.parquet_files import ParquetImage, Shard
from safetydpo_jax.errors import InputError


def read_parquet(
  files: Sequence[epath.Path],
  official: Sequence[SourcePair] | None,
  skipped: list[str] | None,
) -> Table:
  """Reads the files of one dataset, in either form.

  Args:
    files: all of them, in order.
    official: the pairs of CoProV2's CSV, if there is one.
    skipped: takes a line for each file that cannot be read; None: that is an error.

  Raises:
    InputError: a column is missing or of the wrong type, or pairs cannot be rebuilt.
  """
  parquet_files.forget()
  before = len(skipped or ())
  if lost := parquet_files.lost_shards(files):
    pairs.report(f"{files[0].parent} lacks {', '.join(lost)}", skipped)
  shards = [
    shard for file in files if (shard := parquet_files.read_shard(str(file), skipped))
  ]
  whole = len(skipped or ()) == before
  if len({shard.named for shard in shards}) > 1:
    raise InputError(
      f"{files[0].parent} mixes files with names and with bytes in jpg_0"
    )
  if shards and shards[0].named:
    return _read_hub(str(files[0].parent), shards, official, whole)
  return _read_pick_a_pic(str(files[0].parent), shards, official)


def _read_hub(
  folder: str,
  shards: Sequence[Shard],
  official: Sequence[SourcePair] | None,
  whole: bool,
) -> Table:
  """Names in jpg_0 and jpg_1, bytes of the row's own image."""
  entries = [
    (
      f"{shard.file} row {number}",
      ParquetImage(shard.file, number, shard.columns["image"]),
      row,
    )
    for shard in shards
    for number, row in enumerate(shard.rows)
  ]
  owns = [_own_image(row) for _, _, row in entries]
  if None in owns:
    if not whole:
      raise InputError(
        f"{folder}: image.path does not tell the images apart, and files are missing, "
        "so pairs cannot be rebuilt by their order"
      )
    return _read_halves(folder, entries, official)
  rows, images, ties = [], {}, 0
  for (where, image, row), own in zip(entries, map(str, owns)):
    names = [pairs.text(where, key, row[key]) for key in ("jpg_0", "jpg_1")]
    images[own] = image
    side = pairs.preferred_side(where, row["label_0"])
    if side is None:
      ties += 1
      continue
    slot = "safe" if own == names[side] else "unsafe"
    rows.append(_row(where, names[side], names[1 - side], slot, row))
  return Table(folder, rows, images, ties)


def _own_image(row: dict[str, Any]) -> str | None:
  """Which of jpg_0 and jpg_1 the row's own image is; None if that is not clear."""
  path = row.get("image.path")
  for shorten in (str, os.path.basename):
    if isinstance(path, str) and path:
      found = [
        name
        for name in (row["jpg_0"], row["jpg_1"])
        if isinstance(name, str) and shorten(name) == shorten(path)
      ]
      if len(found) == 1:
        return found[0]
  return None


def _read_halves(
  folder: str,
  entries: Sequence[tuple[str, ParquetImage, dict[str, Any]]],
  official: Sequence[SourcePair] | None,
) -> Table:
  """Pairs by the order of rows: safe ones, then the unsafe ones."""
  known = collections.defaultdict(collections.deque)
  for pair in official or ():
    known[pair.captions].append(pair.names)
  half, odd = divmod(len(entries), 2)
  rows, images, ties = [], {}, 0
  for safe, unsafe in zip(entries[:half], entries[half:]):
    where = f"{safe[0]} and {unsafe[0]}"
    side = pairs.preferred_side(where, safe[2]["label_0"])
    if side is None:
      ties += 2
      continue
    names = [safe[2]["jpg_0"], safe[2]["jpg_1"]]
    others = [unsafe[2]["jpg_0"], unsafe[2]["jpg_1"]]
    agree = None not in names and len({*names}) == 2 and {*names} == {*others}
    captions = (unsafe[2]["caption"], safe[2]["caption"])
    by_prompts = official and None not in captions
    fits = captions in known if by_prompts else agree
    if odd or not fits or not (agree or known[captions]):
      raise InputError(
        f"{where}: image.path does not tell the images apart, and by their order these "
        f"are not a pair; "
        f"{'the CSV has no such prompts, or not as often' if official else ''}"
        f"{'' if official else 'give the official CSV with --categories'}"
      )
    preferred, dispreferred = names[side], names[1 - side]
    if not agree:
      # Pairs that share their prompts, in the order of both files.
      preferred, dispreferred = known[captions].popleft()
    images |= {preferred: safe[1], dispreferred: unsafe[1]}
    rows += [
      _row(entry[0], preferred, dispreferred, slot, entry[2])
      for entry, slot in zip((unsafe, safe), SLOTS)
    ]
  return Table(folder, rows, images, ties)


def _read_pick_a_pic(
  folder: str, shards: Sequence[Shard], official: Sequence[SourcePair] | None
) -> Table:
  """Bytes in jpg_0 and jpg_1."""
  prompts = [{pair.captions[slot] for pair in official or ()} for slot in (0, 1)]
  safe_only = prompts[1] - prompts[0]
  named = _name_images(shards)
  rows, images, ties = [], {}, 0
  for shard in shards:
    for number, row in enumerate(shard.rows):
      where = f"{shard.file} row {number}"
      side = pairs.preferred_side(where, row["label_0"])
      if side is None:
        ties += 1
        continue
      names = []
      for column in ("jpg_0", "jpg_1"):
        image = ParquetImage(shard.file, number, shard.columns[column])
        names.append(named[image])
        images.setdefault(named[image], image)
      own = row.get("file_name")
      if own:
        safe = pairs.text(where, "file_name", own) == names[side]
      else:
        safe = pairs.caption(where, row["caption"]) in safe_only
      slot = "safe" if safe else "unsafe"
      rows.append(_row(where, names[side], names[1 - side], slot, row))
  return Table(folder, rows, images, ties)


def _name_images(shards: Sequence[Shard]) -> dict[ParquetImage, str]:
  """The name of every image, see the module's docstring."""
  names: dict[ParquetImage, str] = {}
  paths: dict[ParquetImage, str] = {}
  digests: dict[ParquetImage, str] = {}
  cells = [
    (ParquetImage(shard.file, number, shard.columns[column]), column, row)
    for shard in shards
    for number, row in enumerate(shard.rows)
    for column in ("jpg_0", "jpg_1")
    if row["label_0"] in (0, 1)
  ]
  for image, column, row in cells:
    if isinstance(uid := row.get(f"image_{column[-1]}_uid"), str) and uid:
      names[image] = uid
    elif isinstance(path := row.get(f"{column}.path"), str) and path:
      paths[image] = path
  shared = collections.Counter(paths.values())
  for image, _, _ in cells:  # in the files' order, which reads each row group once
    if image not in names and shared.get(paths.get(image, ""), 0) != 1:
      digest = hashlib.sha256(pairs.read_image(image, str(image).encode()))
      digests[image] = f"sha256-{digest.hexdigest()[:16]}"
  contents = collections.defaultdict(set)
  for image, path in paths.items():
    contents[path].add(digests.get(image))
  unclear = {path for path, found in contents.items() if len(found) > 1}
  trusted = {image: path for image, path in paths.items() if path not in unclear}
  return {**digests, **trusted, **names}


def _row(
  where: str, preferred: str, dispreferred: str, slot: str, row: dict[str, Any]
) -> Row:
  caption = pairs.caption(where, row["caption"])
  tags = (row["category"],) if row.get("category") else ()
  return Row(where, preferred, dispreferred, slot, caption, tags)

"""A folder of prompt sets: which of its files are which set.

A set is a file named after it, with an ending of `set_files.READERS` (`i2p.csv`), or a
folder named after it with such files of any name (`ud/lexica.txt`). What is there and
is neither is named in a printed line.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import set_files
from safetydpo_jax.evaluation.prompt_sets import BENCHMARKS


def locate(
  folder: Path,
  names: Sequence[str] = tuple(BENCHMARKS),
  say: Callable[[str], None] = print,
) -> dict[str, list[Path]]:
  """The sets in a folder and their files.

  Args:
    folder: the folder.
    names: of the sets that are wanted, in the order of the result. Files of other sets
      are passed over.
    say: what prints a line that a reader should know.

  Raises:
    InputError: the folder does not exist, holds none of the sets, or holds one twice:
      as two files, or as a file and a folder.
  """
  if not folder.is_dir():
    trouble = "is not a folder" if folder.exists() else "does not exist"
    raise InputError(
      f"--sets {folder} {trouble}; give the folder that holds {names[0]}.csv and others"
    )
  there, unread = _visible(folder), []
  entries: dict[str, list[Path]] = {}
  for entry in there:
    name = entry.stem if _is_table(entry) else entry.name if entry.is_dir() else ""
    if name in BENCHMARKS:
      entries.setdefault(name, []).append(entry)
    else:
      unread.append(entry)
  found = {}
  for name in names:
    if name not in entries:
      continue
    first, *more = entries[name]
    if more:
      raise InputError(
        f"{folder} has both {first.name} and {more[0].name}; keep one of them"
      )
    inside = _visible(first) if first.is_dir() else [first]
    tables = [entry for entry in inside if _is_table(entry)]
    unread += [entry for entry in inside or [first] if entry not in tables]
    if tables:
      found[name] = tables
  if not found:
    raise InputError(
      f"--sets {folder} contains no prompt set; expected files such as {names[0]}.csv "
      f"(from {BENCHMARKS[names[0]].source}), named after {', '.join(names)}"
      + (f"; it has {_listed(there, folder)}" if there else "")
    )
  if unread:
    say(
      f"{folder}: not read: {_listed(unread, folder)}; expected files "
      f"({', '.join(set_files.READERS)}) or folders named after {', '.join(BENCHMARKS)}"
    )
  return found


def _visible(folder: Path) -> list[Path]:
  """What is in a folder: files by name, then folders. Hidden files are the system's."""
  entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
  return sorted(entries, key=lambda entry: (entry.is_dir(), entry.name))


def _is_table(entry: Path) -> bool:
  return entry.is_file() and entry.suffix.lower() in set_files.READERS


def _listed(entries: Iterable[Path], folder: Path) -> str:
  return ", ".join(str(entry.relative_to(folder)) for entry in entries)[:400]

"""Answers of a language model on disk, and what follows from them.

A concept is asked for in rounds. Round 0 asks for all its pairs, a few per request;
each later round asks for those still missing because they failed, were invalid or
repeated others. A round is planned from the answers of the rounds before it, and
answers count in the order of their requests; so the order in which they arrive decides
nothing.

The file is JSON lines, the first of them what decides the answers:

  {"settings": {…}}
  {"round": 0, "concept": 3, "part": 1, "count": 10, "pairs": [["unsafe", "safe"], …]}

`count` pairs were asked for; those missing from `pairs` were missing from the answer or
invalid. Lines are appended and flushed to disk. A last line without a line end was cut
short by a kill and is dropped.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetydpo_jax.data.writing import prompt_pairs
from safetydpo_jax.data.writing.prompt_pairs import Concept, PromptPair
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import manifest

_BEGINNING = b'{"settings": '


class Request(NamedTuple):
  """One request: its round, the concept's number in the list, its part."""

  round: int
  concept: int
  part: int


class Answer(NamedTuple):
  """How many pairs were asked for, and the valid (unsafe, safe) that came."""

  asked: int
  pairs: list[tuple[str, str]]


class Selection(NamedTuple):
  """The pairs of each concept, and how many were left out."""

  pairs: list[list[PromptPair]]
  duplicates: int
  unused: int


def select_pairs(
  concepts: Sequence[Concept], answers: Mapping[Request, Answer], per_concept: int
) -> Selection:
  """The first `per_concept` pairs of each concept in which no prompt is repeated.

  Answers of a round come before those of the next, so a later round takes nothing from
  what an earlier one found.
  """
  seen: set[str] = set()
  pairs: list[list[PromptPair]] = [[] for _ in concepts]
  duplicates = unused = 0
  for request in sorted(answers):
    mine = pairs[request.concept]
    concept, category = concepts[request.concept]
    for unsafe, safe in answers[request].pairs:
      keys = {prompt_pairs.key(unsafe), prompt_pairs.key(safe)}
      if keys & seen:
        duplicates += 1
      elif len(mine) == per_concept:
        unused += 1
      else:
        seen |= keys
        mine.append(PromptPair(unsafe, safe, category, concept))
  return Selection(pairs, duplicates, unused)


def count_pairs(
  answers: Mapping[Request, Answer], selection: Selection, failed: int
) -> dict[str, int]:
  """What became of the pairs that were asked for."""
  asked = sum(answer.asked for answer in answers.values())
  return {
    "asked": asked + failed,
    "accepted": sum(map(len, selection.pairs)),
    "duplicates": selection.duplicates,
    "invalid": asked - sum(len(answer.pairs) for answer in answers.values()),
    "failed": failed,
    "unused": selection.unused,
  }


def plan_round(
  number: int,
  concepts: Sequence[Concept],
  answers: Mapping[Request, Answer],
  per_concept: int,
  per_request: int,
) -> dict[Request, int]:
  """The requests that round `number` still has to send, and their counts of pairs."""
  before = {request: a for request, a in answers.items() if request.round < number}
  then = select_pairs(concepts, before, per_concept).pairs
  now = select_pairs(concepts, answers, per_concept).pairs
  requests = {}
  for index in range(len(concepts)):
    if len(now[index]) == per_concept:  # also where a request failed before
      continue
    missing = per_concept - len(then[index])
    for part, start in enumerate(range(0, missing, per_request)):
      request = Request(number, index, part)
      if request not in answers:
        requests[request] = min(per_request, missing - start)
  return requests


class AnswerFile:
  """The answers so far; `add` saves one more."""

  def __init__(self, file: Path, lines: BinaryIO, answers: dict[Request, Answer]):
    self.file, self.answers, self._lines = file, answers, lines

  def add(self, request: Request, answer: Answer) -> None:
    """Appends an answer; it is on disk when this returns."""
    line = {**request._asdict(), "count": answer.asked, "pairs": answer.pairs}
    _append(self.file, self._lines, line)
    self.answers[request] = answer


@contextlib.contextmanager
def open_answers(
  file: Path, settings: dict[str, Any], num_concepts: int
) -> Iterator[AnswerFile]:
  """Opens a file of answers, or starts one.

  Args:
    file: its folder is made if it is missing.
    settings: what decides the answers, as JSON holds it.
    num_concepts: how many there are.

  Raises:
    InputError: the file was started with other settings, is damaged, is being written
      by another process, or cannot be written.
  """
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = open(file, "a+b")  # noqa: SIM115 (closed below)
  except OSError as error:
    raise InputError(f"cannot write {file}: {error.strerror}") from error
  with lines:
    try:
      fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise InputError(f"{file} is being written by another run; wait for it") from None
    lines.seek(0)
    *complete, cut_short = lines.read().split(b"\n")
    first = complete[0] if complete else cut_short
    if complete or not first.startswith(_BEGINNING[: len(first)]):
      _check_settings(file, first, settings)
    if cut_short:
      lines.truncate(lines.tell() - len(cut_short))
    answers: dict[Request, Answer] = {}
    if not complete:
      _append(file, lines, {"settings": settings})
    for number, line in enumerate(complete[1:], start=2):
      request, answer = _read_answer(f"{file} line {number}", line, num_concepts)
      answers[request] = answer
    yield AnswerFile(file, lines, answers)


def _append(file: Path, lines: BinaryIO, content: dict[str, Any]) -> None:
  line = json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
  try:
    lines.write(line.encode())
    lines.flush()
    os.fsync(lines.fileno())
  except OSError as error:
    raise InputError(f"cannot write {file}: {error.strerror}") from error


def _check_settings(file: Path, line: bytes, settings: dict[str, Any]) -> None:
  try:
    before = dict(json.loads(line)["settings"])
  except (ValueError, KeyError, TypeError, RecursionError):
    raise InputError(
      f"{file} line 1 holds no settings: it was not written by this command; choose "
      "another --out"
    ) from None
  for name in (*settings, *before):
    was, now = before.get(name), settings.get(name)
    if was != now:
      raise InputError(
        f"{file} was started {manifest.change(name, was, now)}; choose another --out, "
        "or delete it"
      )


def _read_answer(where: str, line: bytes, num_concepts: int) -> tuple[Request, Answer]:
  try:
    content = json.loads(line)
    request = Request(*(content[name] for name in Request._fields))
    count, pairs = content["count"], content["pairs"]
    pairs = [(unsafe, safe) for unsafe, safe in pairs]
    whole = all(type(number) is int and number >= 0 for number in (*request, count))
    fits = request.concept < num_concepts and len(pairs) <= count
    valid = all(prompt_pairs.is_pair({"unsafe": u, "safe": s}) for u, s in pairs)
  except (ValueError, KeyError, TypeError, RecursionError):
    whole = fits = valid = False
  if not (whole and fits and valid):
    raise InputError(
      f"{where} is not an answer to one of these requests; delete the line"
    )
  return request, Answer(count, pairs)

"""What the text of a compiled program says: collectives, and how often loops run.

A computation runs as often as it is called; a `while` runs its body as often as
`known_trip_count` says. XLA's own cost analysis counts every body once, so its bytes
are scaled up by how often the code in loops runs.
"""

import dataclasses
import math
import re
from collections import defaultdict

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|branch_computations)="
  r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":\s*"?(\d+)')
# Instructions that move no data themselves.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: name, result's shape as written, opcode, the rest."""

  name: str
  shape: str
  opcode: str
  rest: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """The instructions of each computation, and the entry's name."""
  computations: dict[str, list[Instruction]] = {}
  entry = current = ""
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = header[2]
      computations[current] = []
      entry = current if header[1] else entry
    elif current and (match := _LINE.match(line)):
      computations[current].append(Instruction(*match.groups()))
  return computations, entry


def times_run(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
  """How often each computation runs; a loop of unknown length counts once."""
  times: dict[str, int] = defaultdict(int)

  def visit(name: str, factor: int) -> None:
    times[name] += factor
    for line in computations.get(name, ()):
      trips = _TRIPS.search(line.rest)
      inner = factor * int(trips[1]) if line.opcode == "while" and trips else factor
      for several, one in _CALLED.findall(line.rest):
        for called in re.findall(r"[\w.\-]+", several or one):
          if called in computations:
            visit(called, inner)

  visit(entry, 1)
  return dict(times)


def _fused(computations: dict[str, list[Instruction]]) -> set[str]:
  """Computations that are part of one instruction, such as a fusion."""
  return {
    called
    for lines in computations.values()
    for line in lines
    if line.opcode not in ("while", "conditional", "call")
    for several, one in _CALLED.findall(line.rest)
    for called in re.findall(r"[\w.\-]+", several or one)
  }


def size(shape: str) -> list[int]:
  """Bytes of each array of a shape as written, without padding."""
  widths = {"pred": 8, "bf16": 16}
  found = []
  for kind, dims in _SHAPE.findall(shape):
    bits = widths.get(kind) or int(re.findall(r"\d+", kind)[0])
    found.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
  return found


def collectives(text: str) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}} of one run of the program, on each chip.

  Bytes are those of the results. An asynchronous one is counted where it starts; its
  shape then holds its input and counters too, and the largest array is the result. The
  TPU compiler also cuts one into pieces, each inside the fusion that it runs beside;
  pieces of one have one channel.
  """
  computations, entry = parse(text)
  fused = _fused(computations)
  found: dict[str, dict[str, int]] = {}
  pieces: dict[tuple[str, str], tuple[int, int]] = {}  # the largest of each channel
  for name, times in times_run(computations, entry).items():
    for line in computations[name]:
      kind = line.opcode.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      sizes = size(line.shape) or [0]
      gathers = line.opcode.endswith("-start") and kind != "all-reduce"
      moved = times * (max(sizes) if gathers else sum(sizes))
      channel = re.search(r"channel_id=\d+", line.rest)
      one = found.setdefault(kind, {"count": 0, "bytes": 0})
      if name in fused and channel:
        before = pieces.get((kind, channel[0]), (0, 0))
        pieces[kind, channel[0]] = max(before, (times, moved))
      else:
        one["count"] += times
        one["bytes"] += moved
  for (kind, _), (times, moved) in pieces.items():
    found[kind]["count"] += times
    found[kind]["bytes"] += moved
  return found


def loop_factor(text: str) -> float:
  """Bytes with loops multiplied out, over bytes with every body once.

  Both by the operands and results of each instruction that is not inside a fusion.
  """
  computations, entry = parse(text)
  fused = _fused(computations)
  once = often = 0
  for name, times in times_run(computations, entry).items():
    if name in fused:
      continue
    sizes = {line.name: sum(size(line.shape)) for line in computations[name]}
    for line in computations[name]:
      if line.opcode in _FREE:
        continue
      operands = re.findall(r"%?([\w.\-]+)", line.rest.split(")", 1)[0])
      moved = sizes[line.name] + sum(sizes.get(operand, 0) for operand in operands)
      once += moved
      often += moved * times
  return often / once if once else 1.0


def count_kernels(text: str) -> int:
  """Pallas kernels in the program's text."""
  return text.count('custom_call_target="tpu_custom_call"')


def used_and_limit(message: str) -> str:
  """What the compiler's refusal says about memory; "" if nothing."""
  match = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", message)
  return match[0] if match else ""

"""What a command says: its result on stdout, notes on stderr, all from process 0."""

import functools
import sys


def say(*lines: str) -> None:
  """Prints lines that belong to the result, if this is process 0 of the job."""
  import jax  # Imported here: it takes a second, and `--help` prints no notes.

  if jax.process_index() == 0:
    for line in lines:
      print(line, flush=True)


@functools.cache
def note(line: str) -> None:
  """Prints a line once, however often it is given, if this is process 0 of the job."""
  import jax  # as above

  if jax.process_index() == 0:
    print(line, file=sys.stderr)

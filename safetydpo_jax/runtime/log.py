"""What a command says of itself beside its result: lines on stderr, from process 0."""

import functools
import sys


@functools.cache
def note(line: str) -> None:
  """Prints a line once, however often it is given, if this is process 0 of the job."""
  import jax  # Imported here: it takes a second, and `--help` prints no notes.

  if jax.process_index() == 0:
    print(line, file=sys.stderr)

"""Bad input is answered with one clear line and a non-zero exit code.

An `InputError` says what is wrong, where, what was expected and what to do. It is
raised where the problem is seen and printed once, here, without a traceback; every
other exception is a defect of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable


class InputError(Exception):
  """Input the user can mend; the message is one line."""


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main`; prints an `InputError` as one line and exits 1."""
  try:
    main()
  except InputError as error:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

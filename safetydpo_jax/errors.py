"""Bad input is answered with one clear line and a non-zero exit code.

An `InputError` says what is wrong, where, what was expected and what to do. It is
raised where the problem is found and printed once, here, without a traceback; any other
exception is a bug and keeps its traceback.

A process that is one of several must not wait for the others when it fails, since they
may be waiting for it.
"""

import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable

# If all hosts hit the same error they exit together; if not, the coordination service
# ends the others, `hosts.HEARTBEAT_SECONDS` after this one is gone.
LEAVE_SECONDS = 10
# The exit code of a job that broke, perhaps because a host was lost; JAX's coordination
# service ends processes with the same (SIGABRT). Launchers such as xpk restart what
# exits with 128 or more, and do not restart bad input, which is 1.
BROKEN = 134
_LONGEST = 2000  # characters of a message; names in foreign files may have a million
# What the system refuses, and the user can allow.
_REFUSED = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
  *(errno.ENOSPC, errno.EDQUOT, errno.EIO),
)


class InputError(Exception):
  """Input that the user can fix; the message is one line."""


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main`; prints an `InputError` as one line and exits 1.

  So is a file that the system does not let us use.
  """
  try:
    main()
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    _leave(130)
  except Exception as error:
    if (message := _message_of(error)) is not None:
      print(f"error: {_one_line(message)}", file=sys.stderr)
      _leave(1)
    if not _is_one_of_several():
      raise
    traceback.print_exc()
    print(
      "error: this process leaves the job, which ends on every host. If another host "
      "was lost first, its log says why; run the same command on every host again to "
      "resume from what is complete",
      file=sys.stderr,
    )
    _leave(BROKEN)


def _message_of(error: Exception) -> str | None:
  """What the user is told; None for a defect of ours."""
  if isinstance(error, InputError):
    return str(error)
  if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
    return f"{error.filename} cannot be used: {error.strerror}; choose another path"
  return None


def _one_line(message: str) -> str:
  """A message as a terminal may show it: one line, and nothing that steers it."""
  line = " ".join(message.split())
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
  half = _LONGEST // 2
  return line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}"


def _is_one_of_several() -> bool:
  jax = sys.modules.get("jax")  # a command without JAX is a single process
  return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
  if _is_one_of_several():
    sys.stdout.flush()
    sys.stderr.flush()
    jax = sys.modules["jax"]
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(LEAVE_SECONDS)
    os._exit(code)  # exit handlers would wait for the others
  sys.exit(code)

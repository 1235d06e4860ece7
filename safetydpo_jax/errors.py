"""Bad input is answered with one clear line and a non-zero exit code.

An `InputError` says what is wrong, where, what was expected and what to do. It is
raised where the problem is found and printed once, here, without a traceback; any other
exception is a bug and keeps its traceback.

A process that is one of several must not wait for the others when it fails, since they
may be waiting for it.
"""

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


class InputError(Exception):
  """Input that the user can fix; the message is one line."""


def run_command(main: Callable[[], None]) -> None:
  """Runs a command's `main`; prints an `InputError` as one line and exits 1."""
  try:
    main()
  except InputError as error:
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr)
    _leave(1)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    _leave(130)
  except Exception:
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

"""Bad input is answered with one clear line and a non-zero exit code.

An `InputError` says what is wrong, where, what was expected and what to do. It is
raised where the problem is seen and printed once, here, without a traceback; every
other exception is a defect of ours and keeps its traceback.

A process that is one of several must not wait for the others when it ends like this,
since they may wait for it.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable

# If every host has met the same error they leave together; if not, the others are ended
# by the coordination service, `hosts.HEARTBEAT_SECONDS` after this one has gone.
LEAVE_SECONDS = 10
# Of a job that broke, perhaps because a host was lost: what JAX's coordination service
# ends a process with (SIGABRT). Launchers such as xpk start again what ends with 128 or
# more, and do not start bad input again, which is 1.
BROKEN = 134


class InputError(Exception):
  """Input the user can mend; the message is one line."""


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
      "error: this process leaves the job, which ends it for all. If another was lost "
      "first, its log says why; the same command on every host goes on from what is "
      "complete",
      file=sys.stderr,
    )
    _leave(BROKEN)


def _is_one_of_several() -> bool:
  jax = sys.modules.get("jax")  # a command without JAX is on its own
  return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
  if _is_one_of_several():
    sys.stdout.flush()
    sys.stderr.flush()
    jax = sys.modules["jax"]
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(LEAVE_SECONDS)
    os._exit(code)  # what runs at exit would wait for the others
  sys.exit(code)

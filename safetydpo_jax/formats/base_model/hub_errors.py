"""Why a download from the Hugging Face hub failed, and the way out, in one line.

The library's exceptions (huggingface_hub/errors.py) are told apart by their names, so
that a class which only some of its versions have needs no import.
"""

import errno
from typing import Any

URL = "https://huggingface.co"
_LOG_IN = "`hf auth login`, or HF_TOKEN in the environment"
_SPELLING = "check its spelling"
_MISSING = (
  "it does not exist, or is private and no account is logged in; "
  f"{_SPELLING}, or {_LOG_IN}"
)


def explain(error: Exception, repository: str, revision: str | None) -> str:
  """The reason and what to do, as "REASON; ADVICE"."""
  status = getattr(getattr(error, "response", None), "status_code", None)
  page = f"{URL}/{repository}"
  for name in (cls.__name__ for cls in type(error).__mro__):
    match name:
      case "GatedRepoError" if status == 401:
        return (
          f"it is gated, and no account is logged in; accept its terms at {page}, then "
          f"{_LOG_IN}"
        )
      case "GatedRepoError":
        return (
          "it is gated, and the account that is logged in has no access; accept its "
          f"terms at {page}, or log in with another account: {_LOG_IN}"
        )
      case "RepositoryNotFoundError" if status == 401:
        return _MISSING
      case "RepositoryNotFoundError":
        return (
          "it does not exist, or is private and the account that is logged in has no "
          f"access; {_SPELLING}, or log in with another account: {_LOG_IN}"
        )
      case "RevisionNotFoundError":
        return (
          f"it has no revision {revision or 'main'!r}; see {page}/tree/main for its "
          "branches, tags and commits"
        )
      case "DisabledRepoError":
        return f"access to it is disabled; see {page}"
      case "IncompleteSnapshotError":
        return f"only a part of it is in the cache, and {_unreachable(error)}"
      case "LocalEntryNotFoundError":
        if (cause := _http_status(error)) is not None:
          return f"the hub answers with status {cause}; try again later"
        return f"it is not in the cache, and {_unreachable(error)}"
      case "OfflineModeIsEnabled" | "NetworkError" | "TimeoutException" | "ProxyError":
        return _unreachable(error)
      case "HFValidationError":
        return "it is not a hub id (NAME/REPOSITORY) either; check the path or the id"
      case "HfHubHTTPError" if status == 401 and "credentials" not in str(error):
        return _MISSING  # a mirror of the hub, whose errors the library knows less of
      case "HfHubHTTPError" if status == 401:
        return (
          "the hub does not accept this machine's token; log in again with "
          "`hf auth login`, or correct HF_TOKEN"
        )
      case "HfHubHTTPError" if status is not None:
        return f"the hub answers with status {status}; try again later"
  if isinstance(error, OSError) and error.errno == errno.ENOSPC:
    return "the disk of its cache is full; make room, or set HF_HOME to another disk"
  if isinstance(error, PermissionError):
    return f"its cache cannot be written ({error}); set HF_HOME to another folder"
  reason = (str(error).strip() or type(error).__name__).splitlines()[0]
  return f"{reason}; try again, which continues the download"


def _unreachable(error: Exception) -> str:
  """Why the hub cannot be reached, and what to do."""
  causes = [error, error.__cause__, error.__context__]
  offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes)
  if offline:
    return (
      "HF_HUB_OFFLINE is set; unset it, or fetch the model where there is a network "
      "and give its folder"
    )
  return (
    "the hub cannot be reached; check the network and its proxy, or fetch the model "
    "elsewhere and give its folder"
  )


def _http_status(error: Exception) -> Any:
  """The status of the answer that made the library look into its cache, if any."""
  return getattr(getattr(error.__cause__, "response", None), "status_code", None)

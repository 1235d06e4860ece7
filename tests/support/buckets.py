"""A store in memory that answers to gs://, for tests of remote paths."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

STORE = {}


class Bucket(MemoryFileSystem):
  """Google Cloud Storage as fsspec shows it, without a network."""

  protocol = ("gs", "gcs")
  store = STORE
  pseudo_dirs = [""]  # noqa: RUF012, MemoryFileSystem's own way

  def __init__(self, **options):
    super().__init__()

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs://"))


def use_bucket() -> None:
  """Makes gs:// mean an empty `Bucket` in this process."""
  STORE.clear()
  Bucket.pseudo_dirs[:] = [""]
  fsspec.register_implementation("gcs", Bucket, clobber=True)


def upload(folder, url: str) -> str:
  """Copies a folder's files to a URL. → the URL"""
  for file in folder.rglob("*"):
    if file.is_file():
      Bucket().pipe_file(f"{url}/{file.relative_to(folder)}", file.read_bytes())
  return url

"""Arrays come out of pickles unchanged, and nothing in a pickle is ever carried out."""

import collections
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import pickles

PROMPTS = np.arange(12).reshape(2, 6).astype(np.float16) / 7


def dump(path, value, protocol=4):
  path.write_bytes(pickle.dumps(value, protocol))
  return path


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_arrays_of_every_protocol(tmp_path, protocol):
  file = dump(tmp_path / "prompts.p", PROMPTS, protocol)
  got = pickles.read_array(file)
  assert got.dtype == np.float16
  np.testing.assert_array_equal(got, PROMPTS)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("array", [PROMPTS.T, PROMPTS.astype(">f4")])
def test_odd_arrays(tmp_path, array, protocol):
  got = pickles.read_array(dump(tmp_path / "a.p", array, protocol))
  assert got.dtype == array.dtype
  np.testing.assert_array_equal(got, array)


def states():
  generator = torch.Generator().manual_seed(0)
  whole = torch.randn((4, 6), generator=generator)
  return collections.OrderedDict(
    whole=whole,
    shared=whole[1:3, ::2],
    turned=whole.T,
    half=whole.half(),
    brain=whole.bfloat16(),
    number=torch.tensor(3.5),
    count=torch.tensor(7),
    none=torch.zeros((0, 3)),
    parameter=torch.nn.Parameter(whole + 1),
  )


@pytest.mark.parametrize("new", [True, False])
def test_state_dicts_of_both_forms(tmp_path, new):
  file = tmp_path / "state.pth"
  torch.save(states(), file, _use_new_zipfile_serialization=new)
  got = pickles.read_tensors(file)
  assert list(got) == list(states())
  for name, tensor in states().items():
    assert got[name].shape == tuple(tensor.shape), name
    np.testing.assert_array_equal(
      got[name].astype(np.float32), tensor.detach().float().numpy(), err_msg=name
    )


@pytest.mark.parametrize("new", [True, False])
def test_a_modules_own_state_dict_and_a_lone_tensor(tmp_path, new):
  form = {"_use_new_zipfile_serialization": new}
  module = torch.nn.BatchNorm2d(3)
  torch.save(module.state_dict(), tmp_path / "norm.pth", **form)
  assert set(pickles.read_tensors(tmp_path / "norm.pth")) == set(module.state_dict())
  torch.save(torch.arange(6.0).reshape(2, 3), tmp_path / "tensor.pt", **form)
  np.testing.assert_array_equal(
    pickles.read_array(tmp_path / "tensor.pt"), np.arange(6.0).reshape(2, 3)
  )


class Touch:
  """On unpickling, makes a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return Path.touch, (self.path,)


class Evaluate:
  def __reduce__(self):
    return eval, ("1 + 1",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_in_a_pickle_is_refused_and_never_made(tmp_path, protocol):
  mark = tmp_path / "mark"
  file = dump(tmp_path / "prompts.p", Touch(mark), protocol)
  with pytest.raises(InputError, match="it asks for"):
    pickles.read_array(file)
  assert not mark.exists()
  pickle.loads(file.read_bytes())
  assert mark.exists(), "the pickle would have done it"


@pytest.mark.parametrize("new", [True, False])
def test_a_call_in_a_state_dict_is_refused(tmp_path, new):
  file = tmp_path / "state.pth"
  torch.save({"w": Evaluate()}, file, _use_new_zipfile_serialization=new)
  with pytest.raises(InputError, match=r"it asks for __builtin__\.eval"):
    pickles.read_tensors(file)


def test_names_reached_through_permitted_ones_are_refused(tmp_path):
  for module, name in (("numpy", "load"), ("torch._utils", "os"), ("torch", "load")):
    code = pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.STOP
    (tmp_path / "a.p").write_bytes(code)
    with pytest.raises(InputError, match=f"it asks for {module}.{name}"):
      pickles.read_array(tmp_path / "a.p")


def test_permitted_names_cannot_be_changed(tmp_path):
  # BUILD with a state dict on the bare global: would set its attributes
  code = b"cnumpy\ndtype\n}Vname\nVx\nsb."
  (tmp_path / "a.p").write_bytes(code)
  with pytest.raises(InputError, match="it changes dtype"):
    pickles.read_array(tmp_path / "a.p")


def test_a_monstrous_memo_index_does_not_take_the_memory(tmp_path):
  (tmp_path / "a.p").write_bytes(b"K\x01r\xff\xff\xff\xef.")
  with pytest.raises(InputError, match="memo has a huge index"):
    pickles.read_array(tmp_path / "a.p")


def test_objects_in_an_array_are_refused(tmp_path):
  file = dump(tmp_path / "a.p", np.array([{}, []], dtype=object))
  with pytest.raises(InputError, match="numbers of type 'O8'"):
    pickles.read_array(file)


@pytest.mark.parametrize("content", [{"a": 1}, [1.0], "text", None, 3])
def test_what_is_no_array_is_refused(tmp_path, content):
  file = dump(tmp_path / "a.p", content)
  with pytest.raises(InputError, match="is not a pickled array"):
    pickles.read_array(file)
  with pytest.raises(InputError, match="is not a PyTorch state dict"):
    pickles.read_tensors(file)


def reach(arguments):
  """A pickle of one tensor of 4 stored float32 with these arguments after it."""

  class Storage:
    pass

  class Tensor:
    def __reduce__(self):
      return torch._utils._rebuild_tensor_v2, (Storage(), *arguments)

  class Pickler(pickle.Pickler):
    def persistent_id(self, value):
      if isinstance(value, Storage):
        return ("storage", torch.FloatStorage, "0", "cpu", 4)
      return None

  buffer = io.BytesIO()
  Pickler(buffer, 2).dump({"w": Tensor()})
  return buffer.getvalue()


def save_zip(path, data, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("a/data.pkl", data)
    archive.writestr("a/data/0", np.arange(4, dtype=np.float32).tobytes())
  return path


def test_a_tensor_stays_within_its_storage(tmp_path):
  file = tmp_path / "a.pth"
  save_zip(file, reach((1, (3,), (1,), False, {})))
  np.testing.assert_array_equal(pickles.read_tensors(file)["w"], [1, 2, 3])
  for arguments in (
    (2, (3,), (1,)),
    (0, (3,), (2,)),
    (-1, (3,), (1,)),
    (3, (3,), (-1,)),
    (0, (100, 100), (0, 0)),
    (0, (2, 2), (1,)),
    (0, (-3,), (1,)),
  ):
    save_zip(file, reach((*arguments, False, {})))
    with pytest.raises(InputError, match="a tensor"):
      pickles.read_tensors(file)


def test_compressed_and_overlong_zips_are_refused(tmp_path):
  data = reach((0, (4,), (1,), False, {}))
  file = save_zip(tmp_path / "a.pth", data, zipfile.ZIP_DEFLATED)
  with pytest.raises(InputError, match="compressed"):
    pickles.read_tensors(file)
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("a/other", b"")
  with pytest.raises(InputError, match=r"no data\.pkl"):
    pickles.read_tensors(file)


@pytest.mark.parametrize("new", [True, False])
def test_files_cut_short_are_refused(tmp_path, new):
  """Wherever the end is: an empty tensor's storage, too, must be there."""
  file = tmp_path / "state.pth"
  for state in ({"none": torch.zeros(0, 3)}, {"some": torch.arange(3.0)}):
    torch.save(state, file, _use_new_zipfile_serialization=new)
    content = file.read_bytes()
    for length in range(0, len(content), 37 if new else 1):
      file.write_bytes(content[:length])
      with pytest.raises(InputError, match=r"state\.pth"):
        pickles.read_tensors(file)
  with pytest.raises(InputError, match="No such file"):
    pickles.read_tensors(tmp_path / "nothing.pth")

"""Lines beside a command's result: once each, on stderr, from one process."""

import jax

from safetydpo_jax.runtime.log import note, say


def test_a_line_is_printed_once(capsys):
  for line in ("one of log_test", "another", "one of log_test"):
    note(line)
  captured = capsys.readouterr()
  assert captured.err == "one of log_test\nanother\n"
  assert captured.out == ""


def test_other_processes_say_nothing(capsys, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  note("a line of process 1")
  assert capsys.readouterr().err == ""


def test_lines_of_the_result_go_to_stdout_from_one_process(capsys, monkeypatch):
  say("one", "another")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  say("one of process 1")
  assert capsys.readouterr() == ("one\nanother\n", "")

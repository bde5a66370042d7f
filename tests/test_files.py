"""Files appear complete or not at all, and the harness of faults detects violations."""

import json
import os
import signal

import pytest
import torch

from memlm import files
from tests.faults import every_fault
from tests.processes import Python


class WriteAFile:
    def __init__(self, folder):
        files.write(folder / "a", "old" * 9)

    def save(self, folder):
        files.write(folder / "a", "newer" * 9)

    def check(self, folder, done):
        text = (folder / "a").read_text()
        assert text == "newer" * 9 or (text == "old" * 9 and not done)


class CarelessFile(WriteAFile):
    def save(self, folder):
        (folder / "a.tmp").write_text("newer" * 9)
        (folder / "a.tmp").replace(folder / "a")


class MakeAFolder:
    def __init__(self, folder):
        pass

    def save(self, folder):
        with files.new_folder(folder / "made") as partial:
            (partial / "below").mkdir()
            (partial / "below" / "a").write_bytes(bytes(5000))
            (partial / "b").write_text("b")

    def check(self, folder, done):
        if (folder / "made").exists():
            files.check_seal(folder / "made")
            assert (folder / "made" / "below" / "a").read_bytes() == bytes(5000)
        else:
            assert not done


@pytest.mark.parametrize("scenario", [WriteAFile, MakeAFolder])
def test_a_write_survives_every_fault(scenario, tmp_path):
    report = every_fault(f"tests.test_files:{scenario.__name__}", tmp_path)
    assert report["tried"] == 5 * report["operations"] + 1


def test_the_harness_finds_what_is_never_synced(tmp_path):
    with pytest.raises(AssertionError, match="lost at operation"):
        every_fault("tests.test_files:CarelessFile", tmp_path)


def test_tensors_are_written_for_whom_the_umask_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_tensors(tmp_path / "below" / "a", {"x": torch.ones(3)}, {"said": "yes"})
    finally:
        os.umask(before)
    assert (tmp_path / "below" / "a").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a"]


def test_a_seal_names_what_is_missing_or_changed(tmp_path):
    with files.new_folder(tmp_path / "f") as partial:
        (partial / "a").write_bytes(bytes(range(100)))
        (partial / "b").write_text("b")
    files.check_seal(tmp_path / "f")
    content = bytearray((tmp_path / "f" / "a").read_bytes())
    content[50] ^= 4
    (tmp_path / "f" / "a").write_bytes(content)
    with pytest.raises(ValueError, match="a: damaged"):
        files.check_seal(tmp_path / "f")
    (tmp_path / "f" / "a").unlink()
    with pytest.raises(ValueError, match="a: missing"):
        files.check_seal(tmp_path / "f")


def test_a_folder_that_is_there_stays(tmp_path):
    for text in ("first", "second"):
        with files.new_folder(tmp_path / "f") as partial:
            (partial / "a").write_text(text)
    assert (tmp_path / "f" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from memlm import files\n"
        "with files.lock(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    other = Python("-c", code, tmp_path)
    other.until(lambda: other.said()[0] == "in\n")
    with pytest.raises(ValueError, match=rf"process {other.pid} on .* writes there"), files.lock(tmp_path):
        pass
    other.kill()
    assert other.wait() == -signal.SIGKILL
    with files.lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "3", "null", '{"a": "\ud800"}'])
def test_json_of_another_kind_is_one_line(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"x\.json") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)
    path.write_text(json.dumps({"a": 1}))
    assert files.read_json(path) == {"a": 1}

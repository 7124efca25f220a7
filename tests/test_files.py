"""Files that could not be written are told before the work whose results they get; and stored results."""

import re

import pytest

from hub_magmax.errors import OutputError
from hub_magmax.files import check_files, check_folder, read_result, write_bytes


@pytest.fixture
def read_only(monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hub_magmax.files.tempfile.TemporaryFile", refuse)


def test_files_that_are_there_or_can_be_made_pass_and_nothing_is_left(tmp_path):
    write_bytes(tmp_path / "old", b"old")
    check_files([tmp_path / "old", tmp_path / "new"])
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_folder_in_the_place_of_a_file_is_told(tmp_path):
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(OutputError, match=r"table\.csv: this is a folder, not a file") as found:
        check_files([tmp_path / "new", tmp_path / "table.csv"])
    assert "move the folder away" in str(found.value)


def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(OutputError, match="none: there is no such folder"):
        check_files([tmp_path / "none" / "lock.json"])
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: this is a file, not a folder"):
        check_folder(tmp_path / "file")


@pytest.mark.usefixtures("read_only")
def test_a_folder_without_permission_is_told_with_what_to_do(tmp_path):
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)") as found:
        check_files([tmp_path / "new"], "Say where to write it.")
    assert found.value.hint == "Say where to write it." and found.value.where == str(tmp_path)
    with pytest.raises(OutputError, match="Check the path and its permissions"):
        check_folder(tmp_path)


def test_a_result_that_cannot_be_read_is_not_called_one_of_another_version(tmp_path):
    told = "cannot be read (Is a directory)"
    with pytest.raises(OutputError, match=re.escape(told)) as caught:
        read_result(tmp_path, dict, "a diagnosis", "Delete it.")
    assert "Delete it." not in str(caught.value)
    (tmp_path / "here.json").write_text("[")
    with pytest.raises(OutputError, match=r"not a diagnosis of this version.*Delete it\."):
        read_result(tmp_path / "here.json", dict, "a diagnosis", "Delete it.")

"""What a folder of exports holds, whatever else lies in it."""

import logging
import os
import socket
import time

import pytest

from bertgen_tf.checkpoints import versions
from bertgen_tf.checkpoints.versions import VersionFolder, check_files, stamp


def make(folder, *paths):
    for path in paths:
        (folder / path).mkdir(parents=True)
        (folder / path / "saved_model.pb").write_bytes(b"graph")
    return folder


def numbers(folder):
    found, _ = folder.scan()
    return {name: sorted(paths) for name, paths in found.items()}


def problems(folder):
    return {str(path.relative_to(folder.path)): why for path, why in folder.scan()[1].items()}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("models", {"name": [1, 2], "other": [7]}),
        ("models/name", {"name": [1, 2]}),
        ("models/name/2", {"name": [2]}),
        ("link", {"name": [1, 2]}),
        ("plain", {"plain": [1]}),
    ],
)
def test_folder_of_models_of_a_model_of_a_version(tmp_path, given, found):
    make(tmp_path, "models/name/1", "models/name/2", "models/other/7", "plain")
    (tmp_path / "link").symlink_to(tmp_path / "models/name")
    assert numbers(VersionFolder(tmp_path / given)) == found


def test_versions_are_of_int64_and_folders(tmp_path):
    make(tmp_path, "name/1", "name/9223372036854775807", "name/9223372036854775808", "name/01")
    make(tmp_path, "name/-3", "name/²", "name/1.5", "name/007", "name/" + "9" * 200)
    (tmp_path / "name/2").write_text("")
    os.mkfifo(tmp_path / "name/3")
    (tmp_path / "name/4").symlink_to("nothing")
    (tmp_path / "name/5").symlink_to("5")
    (tmp_path / "name/6").symlink_to("1")
    folder = VersionFolder(tmp_path)
    assert numbers(folder) == {"name": [1, 6, 7, 2**63 - 1]}
    assert folder.scan()[0]["name"][1].name == "1"
    assert problems(folder) == {
        "name/01": "has the version of 1",
        "name/2": "must be a folder",
        "name/3": "must be a folder",
        "name/4": "is a link to nothing",
        "name/5": "is a link to nothing",
        "name/9223372036854775808": "must have a version of at most 9223372036854775807",
        "name/" + "9" * 200: "must have a version of at most 9223372036854775807",
    }


@pytest.mark.parametrize("name", ["a b", "a\nb", "é", "a:b", "a%2fb", b"\xff\xfe", "x" * 99 + "?"])
def test_names_that_no_url_holds(tmp_path, name):
    make(tmp_path, "name.of-A_model/1")
    os.makedirs(os.path.join(os.fsencode(tmp_path), os.fsencode(name), b"1"))
    folder = VersionFolder(tmp_path)
    assert numbers(folder) == {"name.of-A_model": [1]}
    (why,) = problems(folder).values()
    assert why == "must have a name of letters, digits, '.', '_' and '-'"
    alone = VersionFolder(tmp_path / os.fsdecode(name))
    assert numbers(alone) == {} and why in alone.scan()[1].values()


def test_what_appears_later_hides_nothing(tmp_path):
    folder = VersionFolder(make(tmp_path, "name/1"))
    make(tmp_path, "8")
    (tmp_path / "saved_model.pb").write_bytes(b"graph")
    assert numbers(folder) == {"name": [1]}
    # Nor do models whose names are numbers, from the start.
    (tmp_path / "saved_model.pb").unlink()
    (tmp_path / "8/saved_model.pb").unlink()
    make(tmp_path, "2024/3")
    assert numbers(VersionFolder(tmp_path)) == {"2024": [3], "name": [1]}
    model = VersionFolder(make(tmp_path / "name", "old/1"))
    assert numbers(model) == {"name": [1]}
    assert problems(model) == {"old": "is not served beside the versions of name"}


def test_a_folder_that_cannot_be_read_costs_nothing_else(tmp_path, monkeypatch):
    folder = VersionFolder(make(tmp_path, "name/1", "other/1"))
    listdir = os.listdir

    def refuse(path):
        if os.path.basename(path) == "other":
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert numbers(folder) == {"name": [1]}
    assert problems(folder) == {"other": "cannot be listed: Permission denied"}
    monkeypatch.undo()
    (tmp_path / "gone").symlink_to("nothing")
    assert problems(folder) == {"gone": "is a link to nothing"}
    gone = VersionFolder(tmp_path / "gone")
    assert gone.scan()[1] == {gone.path: "cannot be listed: No such file or directory"}


def test_each_problem_is_logged_once(tmp_path, caplog):
    make(tmp_path, "name/1", *(f"name/{10**30 + i}" for i in range(100)))
    folder = VersionFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            folder.tell(folder.scan()[1])
        assert len(caplog.records) == 21 and caplog.messages[-1] == "not served: 80 more"
        assert f"{10**30} must have a version of at most" in caplog.messages[0]
        make(tmp_path, "a b/1")
        folder.tell(folder.scan()[1])
        assert len(caplog.records) == 22 and "a b must have a name" in caplog.messages[-1]


def test_many_folders_take_little_time(tmp_path):
    make(tmp_path, "name/1")
    for number in range(10_000):
        os.mkdir(tmp_path / f"name/{number + 2}")
    folder = VersionFolder(tmp_path)
    start = time.process_time()
    assert len(numbers(folder)["name"]) == 10_001
    assert time.process_time() - start < 2


def test_stamps_differ_when_files_do(tmp_path):
    version = make(tmp_path, "1") / "1"
    (version / "variables").mkdir()
    (tmp_path / "target").write_text("a")
    seen = [stamp(version)]
    assert stamp(version) == seen[0]
    steps = [
        lambda: (version / "variables/data").write_text("a"),
        lambda: os.utime(version / "variables/data", ns=(0, 0)),
        lambda: (version / "variables/data").chmod(0o600),
        lambda: (version / "dangling").symlink_to("nothing"),
        lambda: (version / "link").symlink_to(tmp_path / "target"),
        lambda: (tmp_path / "target").write_text("other"),
        lambda: os.mkfifo(version / "pipe"),
        lambda: (version / "loop").symlink_to("loop"),
        lambda: (version / "up").symlink_to(".."),
        lambda: (version / "pipe").unlink(),
    ]
    for step in steps:
        step()
        seen.append(stamp(version))
    assert all(seen) and len(set(seen)) == len(steps) + 1
    assert stamp(tmp_path / "2") == ""


@pytest.mark.parametrize("where", ["metadata.json", "saved_model.pb", "variables/variables.index"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_files_are_loaded(tmp_path, monkeypatch, where, kind):
    version = make(tmp_path, "1") / "1"
    (version / "variables").mkdir()
    check_files(version)
    path = version / where
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    with pytest.raises(ValueError, match=rf"{where} must be a file, but is a pipe"):
        check_files(version)


def test_what_does_no_harm_is_loaded(tmp_path):
    version = make(tmp_path, "1") / "1"
    (version / ".#saved_model.pb").symlink_to("user@host.1234:5678")
    (version / "loop").symlink_to("loop")
    (version / "root").symlink_to("/")
    (tmp_path / "2").symlink_to("1")
    check_files(version)
    check_files(tmp_path / "2")


def test_too_much_is_not_loaded(tmp_path, monkeypatch):
    version = make(tmp_path, "1") / "1"
    with open(version / "saved_model.pb", "wb") as file:
        file.truncate(2**40)  # of which nothing is on the disk
    with pytest.raises(ValueError, match="must have at most 2,147,483,647 bytes"):
        check_files(version)
    (version / "saved_model.pb").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no saved_model\.pb"):
        check_files(version)
    monkeypatch.setattr(versions, "_MAX_FILES", 3)
    make(version, "a/b/c")
    assert stamp(version)
    with pytest.raises(ValueError, match="must have fewer than 3 files"):
        check_files(version)

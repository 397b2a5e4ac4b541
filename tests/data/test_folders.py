"""What killed runs leave, and errors of disks."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from safetensors import SafetensorError

from bertgen_tf.checkpoints import presets
from bertgen_tf.data import folders

# The module needs nothing but Python: so without TensorFlow, whose import takes seconds.
RUN = """
import os, pathlib, runpy, signal, sys, types
module, target, what = sys.argv[1:]
folders = types.SimpleNamespace(**runpy.run_path(module))
rename, renamed = pathlib.Path.rename, []

def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def write(path):
    (path / "weights").write_text("new")
    if what == "kill while it writes":
        kill()
    if what == "wait":
        print("writing", flush=True)
        sys.stdin.readline()

def rename_once(self, path):
    renamed.append(path)
    kill() if len(renamed) == 2 else rename(self, path)

if what == "kill while it replaces":
    pathlib.Path.rename = rename_once
if what == "kill after it replaced":
    folders.write_folder.__globals__["shutil"].rmtree = kill
if what == "kill in a file":
    with folders.whole_file(target) as path:
        path.write_text("new")
        kill()
folders.write_folder(target, write, lambda folder: True, "a test")
"""


def start(target: Path, what: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, folders.__file__, str(target), what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(target: Path, what: str) -> None:
    with start(target, what) as process:
        assert process.wait(60) == -signal.SIGKILL


def write(target: Path, text: str = "next") -> None:
    def fill(path: Path) -> None:
        (path / "weights").write_text(text)

    folders.write_folder(target, fill, lambda folder: True, "a test")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path):
    target = tmp_path / "model"
    write(target, "older")
    for what in ("kill while it writes", "kill while it writes", "kill in a file"):
        # A run that is killed removes what the one before left.
        kill(target, what)
        hidden, name = names(tmp_path)
        assert (name, re.sub("-[a-z0-9_]{8}$", "-X", hidden)) == ("model", ".model.bertgen_tf-X")
        assert (target / "weights").read_text() == "older"
    write(tmp_path / "another")
    assert names(tmp_path) == [hidden, "another", "model"]
    write(target)
    assert names(tmp_path) == ["another", "model"]
    assert (target / "weights").read_text() == "next"
    kill(target, "kill after it replaced")
    assert (target / "weights").read_text() == "new" and len(names(tmp_path)) == 3
    folders.sweep(target)
    assert names(tmp_path) == ["another", "model"]
    assert (target / "weights").read_text() == "new"


def test_what_is_being_written_is_left_alone(tmp_path):
    target = tmp_path / "model"
    with start(target, "wait") as process:
        assert process.stdout.readline() == "writing\n"
        (hidden,) = names(tmp_path)
        write(target)
        assert names(tmp_path) == [hidden, "model"]
        process.communicate("\n", 60)
    assert process.returncode == 0 and names(tmp_path) == ["model"]
    assert (target / "weights").read_text() == "new"


def test_what_was_being_replaced_is_put_back(tmp_path):
    target = tmp_path / "model"
    write(target, "older")
    kill(target, "kill while it replaces")
    new, old = names(tmp_path)
    assert old == f"{new}-old"
    message = f"{target} is missing, because .* replaced it: rename {tmp_path / old} to model."
    for read in (presets.load, presets.read_config):
        with pytest.raises(FileNotFoundError, match=message):
            read(target)
    with pytest.warns(UserWarning, match=f"{target} is the older one again: a run was killed"):
        folders.sweep(target)
    assert names(tmp_path) == ["model"] and (target / "weights").read_text() == "older"
    folders.check_replaced(target)


def test_nothing_else_is_removed(tmp_path):
    """Whatever is the user's, or another name's, or another user's."""
    ours = ".model.bertgen_tf-0123abcd"
    kept = [".model-0123abcd", ".model.bertgen_tf-notes", f"{ours}-older", f".x{ours}", ours[1:]]
    kept += [".models.bertgen_tf-0123abcd", ".model.bertgen_tf-0123ABCD"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / ours).symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".model.bertgen_tf-000file0").touch()
    if os.geteuid() == 0:
        (tmp_path / ".model.bertgen_tf-another0").mkdir()
        os.chown(tmp_path / ".model.bertgen_tf-another0", 12345, -1)
    before = sorted(tmp_path.rglob("*"))
    write(tmp_path / "model")
    (tmp_path / "model" / "weights").unlink()
    (tmp_path / "model").rmdir()
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / ours).rename(tmp_path / f"{ours}-old")
    folders.sweep(tmp_path / "model")
    assert (tmp_path / f"{ours}-old").is_symlink()
    (tmp_path / ours).mkdir()
    folders.sweep(tmp_path / "model")
    assert not (tmp_path / ours).exists()


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    """As on some network file systems, where nobody knows who writes."""

    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".model.bertgen_tf-0123abcd").mkdir()
    write(tmp_path / "model")
    write(tmp_path / "model")
    assert names(tmp_path) == [".model.bertgen_tf-0123abcd", "model"]


def test_a_folder_that_another_run_sweeps_at_once_is_made_again(tmp_path, monkeypatch):
    made, lock = [], folders._lock

    def sweep_first(path):
        if not made:
            Path(path).rmdir()
        made.append(path)
        return lock(path)

    monkeypatch.setattr(folders, "_lock", sweep_first)
    write(tmp_path / "model")
    assert len(set(made)) == 2 and names(tmp_path) == ["model"]


def test_a_folder_that_was_removed_while_it_was_being_locked_is_made_again(tmp_path, monkeypatch):
    flock, made = fcntl.flock, []

    def removed_first(descriptor, operation):
        if not made:
            made.extend(path for path in tmp_path.iterdir())
            made[0].rmdir()
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with folders.temporary_folder(tmp_path / "a") as temporary:
        assert temporary.is_dir() and temporary != made[0]


def test_links_that_lead_nowhere_are_no_error_of_a_sweep(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    folders.sweep(tmp_path / "a")


def test_whole_files(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), folders.whole_file(path) as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "older" and names(tmp_path) == ["scores.json"]
    with folders.whole_file(path) as new:
        new.write_text("whole")
        new.chmod(0o600)  # as safetensors does
    assert path.read_text() == "whole" and names(tmp_path) == ["scores.json"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    absent = tmp_path / "absent" / "x"
    with pytest.raises(FileNotFoundError) as caught, folders.whole_file(absent):
        pass
    assert caught.value.filename == str(absent) and not absent.parent.exists()


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, FULL), (errno.ENOSPC, "a")),
        (OSError(errno.EDQUOT, "x", "other"), (errno.EDQUOT, "other")),
        (OSError(errno.EROFS, "x", "tmp/a/b"), (errno.EROFS, "a/a/b")),
        (PermissionError(errno.EACCES, "x", "tmp"), (errno.EACCES, "a")),
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), (errno.ENOSPC, "a")),
        (tf.errors.UnknownError(None, None, f"tmp/x; {FULL}"), (errno.ENOSPC, "a")),
        (OSError(f"file write failed: errno = 28, error message = '{FULL}'"), (errno.ENOSPC, "a")),
        (RuntimeError(f"Problems closing file ('{FULL}')"), (errno.ENOSPC, "a")),
        # Nothing to do with the disk that is written to.
        (ValueError(f"received {FULL!r}"), None),
        (ConnectionError(f"the server says: {FULL}"), None),
        (FileNotFoundError(errno.ENOENT, "x", "other"), None),
        (SafetensorError("shapes differ"), None),
    ],
)
def test_errors_of_disks_are_oserrors_with_a_path(error, expected):
    with pytest.raises(type(error) if expected is None else OSError) as caught:
        with folders.disk_errors("a", "tmp"):
            raise error
    if expected is None:
        assert caught.value is error and not folders.is_disk_error(error)
    else:
        assert (caught.value.errno, caught.value.filename) == expected
        assert caught.value.__cause__ is error

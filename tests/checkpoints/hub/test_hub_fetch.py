"""Fetching modules: servers, archives, caches, what is hostile in them."""

import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import tracemalloc
import urllib.parse
from pathlib import Path

import pytest
import tensorflow_hub
from tensorflow_hub import resolver

import bertgen_tf as bg
from bertgen_tf.checkpoints.hub import fetch
from tests.helpers.hub import arrays, check_against_module, check_block, check_error

# Over HTTP


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server in the hub protocol; `archives` is path -> bytes, `requests` what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            self.server.requests.append(self.path)
            known = url.path in self.server.archives
            if known and urllib.parse.parse_qs(url.query).get("tf-hub-format") == ["compressed"]:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.server.archives[url.path])
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "TFHUB_MODEL_LOAD_FORMAT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.archives, server.requests = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pack(folder: str, mode: str = "w:gz") -> bytes:
    """A module as the hub sends it: a .tar.gz without a folder around."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        # variables/ last, so that an archive that is cut lacks them.
        for name in sorted(os.listdir(folder)):
            archive.add(os.path.join(folder, name), arcname=f"./{name}")
    return buffer.getvalue()


def test_a_module_is_fetched_once_and_kept(server, module_of, loaded_of, tmp_path, monkeypatch):
    server.archives["/tiny/1"] = pack(module_of("tanh"))
    handle = f"{server.url}/tiny/1"
    check_against_module(bg.BertGenerationEncoder.from_hub(handle), loaded_of("tanh"))
    assert server.requests == ["/tiny/1?tf-hub-format=compressed"]
    kept = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(kept) == 1 and (kept[0] / "saved_model.pb").is_file()

    # The second time there is no server.
    server.archives.clear()
    model = bg.EncoderDecoderModel.from_hub(encoder=handle, decoder=handle, share=True)
    check_block(model.decoder.blocks[1], arrays(loaded_of("tanh")), 1)
    assert len(server.requests) == 1
    # It is in that cache and in no other.
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "other"))
    check_error(handle, ValueError, "404")


def test_a_killed_download_is_in_nobodys_way(server, module_of, tmp_path):
    """Nor what tensorflow_hub leaves, which waits for ten minutes until it goes on."""
    server.archives["/tiny/1"] = pack(module_of("tanh"))
    handle = f"{server.url}/tiny/1"
    name = hashlib.sha1(handle.encode()).hexdigest()
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{name}.lock").write_text("machine.1.abc")
    dead = tmp_path / f"cache/.{name}.bertgen_tf-0123abcd"
    dead.mkdir()
    assert fetch.resolve(handle) == str(tmp_path / "cache" / name)
    assert (tmp_path / "cache" / name / "saved_model.pb").exists() and not dead.exists()


def test_archives_that_are_broken(server, module_of, tmp_path):
    whole = pack(module_of("gelu"))
    server.archives |= {
        "/text": b"<html>moved</html>",
        "/empty": b"",
        "/cut": whole[: len(whole) // 2],
        "/nearly": whole[: -len(whole) // 10],
        "/headless": whole[100:],
    }
    rule = "should answer with a .tar.gz of a TF Hub module, but fetching or unpacking it failed"
    for path in server.archives:
        check_error(server.url + path, ValueError, rule)
    message = check_error(f"{server.url}/absent", ValueError, rule)
    assert "404" in message
    # Nothing of it stays, so that the next try fetches again.
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    server.archives = dict.fromkeys(server.archives, whole)
    bg.BertGenerationEncoder.from_hub(f"{server.url}/cut", verify=False)


def test_what_is_kept_and_unusable_is_told(server, module_of, tmp_path):
    """tensorflow_hub never fetches again what it could unpack, such as an archive cut in time."""
    folder = shutil.copytree(module_of("gelu"), tmp_path / "part")
    kept = f"kept in {tmp_path}/cache/[0-9a-f]+: delete it to fetch it again"
    for absent, message in (
        ("variables", "loading it failed"),
        ("saved_model.pb", "but holds ass"),
    ):
        path = folder / absent
        path.rename(tmp_path / "away")
        server.archives[f"/{absent}"] = pack(folder)
        check_error(f"{server.url}/{absent}", ValueError, kept, message)
        (tmp_path / "away").rename(path)


def tar(*members: tuple[str, object]) -> bytes:
    """A .tar.gz of files (bytes), or of members with a type and where they link to."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (("saved_model.pb", b"x"), *members):
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return buffer.getvalue()


def long_name(kind: str) -> bytes:
    """A small .tar.gz with a header of 16 MiB: a long name of GNU's format, or pax attributes."""
    long = "x" * 2**24
    form = tarfile.GNU_FORMAT if kind == "name" else tarfile.PAX_FORMAT
    buffer = io.BytesIO()
    pax = {"comment": long}
    options = {"format": form, "pax_headers": pax if kind == "global" else None}
    with tarfile.open(fileobj=buffer, mode="w:gz", **options) as archive:
        if kind != "global":
            archive.addfile(tarfile.TarInfo("first"))
        member = tarfile.TarInfo(long if kind == "name" else "saved_model.pb")
        member.linkname = long if kind == "link" else ""
        member.pax_headers = pax if kind == "member" else {}
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["name", "link", "member", "global"])
def test_headers_cannot_fill_the_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    content = long_name(kind)
    assert len(content) < 10**5
    (tmp_path / "bomb.tar.gz").write_bytes(content)
    tracemalloc.start()
    check_error(
        tmp_path / "bomb.tar.gz", ValueError, "a header in the archive has more than 1048576 bytes"
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("kind", ["folder", "name"])
def test_a_folder_with_a_size_leaves_no_room_for_a_header(kind, tmp_path):
    """tarfile reads nothing of a folder, whatever size it declares."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("assets")
        folder.type, folder.size = tarfile.DIRTYPE, 2**24 if kind == "folder" else 0
        archive.addfile(folder)
        archive.addfile(tarfile.TarInfo("a/" * (2**22 if kind == "folder" else 2**12)))
    buffer.seek(0)
    messages = {
        "folder": "'assets' of the archive is not a plain",
        "name": "a name of 819[12] char",
    }
    with pytest.raises(ValueError, match=messages[kind]):
        fetch.unpack(buffer, str(tmp_path / "folder"))


def test_long_names_and_many_files_are_read(tmp_path):
    """What the bound leaves: names beyond the 100 bytes of a plain header, and large files."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "/".join(["assets", *["folder" * 8] * 6, "vocab.txt"])
        contents = {name: b"a" * 3 * 2**20, "saved_model.pb": b"", "other": b"b" * (2**20 + 1)}
        contents |= {f"{name}{i}": bytes([i]) for i in range(9)}
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as archive:
            for path, content in contents.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        folder = tmp_path / str(form)
        buffer.seek(0)
        fetch.unpack(buffer, str(folder))
        for path, content in contents.items():
            assert (folder / path).read_bytes() == content


OUTSIDE = "member .* of the archive would lie outside its folder"


NO_FILE = "member .* of the archive is not a plain file or folder"


HOSTILE = {
    "parent": ([("../escaped", b"x")], OUTSIDE),
    "deeper": ([("assets/../../escaped", b"x")], OUTSIDE),
    "inside": ([("assets/../escaped", b"x")], OUTSIDE),
    "absolute": ([("ROOT/escaped", b"x")], OUTSIDE),
    "folder": ([("../escaped", (tarfile.DIRTYPE, ""))], OUTSIDE),
    "link": ([("link", (tarfile.SYMTYPE, "..")), ("link/escaped", b"x")], NO_FILE),
    "absolute link": ([("link", (tarfile.SYMTYPE, "ROOT")), ("link/escaped", b"x")], NO_FILE),
    "hard link": ([("link", (tarfile.LNKTYPE, "../secret")), ("link", b"x")], NO_FILE),
    "device": ([("null", (tarfile.CHRTYPE, ""))], NO_FILE),
    "fifo": ([("pipe", (tarfile.FIFOTYPE, ""))], NO_FILE),
    "large": ([(f"assets/{i}", bytes(3000)) for i in range(4)], "unpacks to more than 9999 bytes"),
    "sparse": ([("hole", (tarfile.GNUTYPE_SPARSE, ""))], NO_FILE),
    "many": ([(f"assets/{i}", b"") for i in range(30)], "or 20 files"),
}


def links(folder) -> dict[Path, int]:
    """How many names each file has; the lock of a download stays."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.stat().st_nlink for path in files}


@pytest.mark.parametrize("source", ["url", "file"])
@pytest.mark.parametrize("case", HOSTILE)
def test_archives_cannot_escape_nor_fill_the_disk(case, source, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_UNPACKED_BYTES", 9999)
    monkeypatch.setattr(fetch, "MAX_MEMBERS", 20)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/secret").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    members, message = HOSTILE[case]
    root = str(tmp_path)
    content = tar(
        *(
            (
                name.replace("ROOT", root),
                c if isinstance(c, bytes) else (c[0], c[1].replace("ROOT", root)),
            )
            for name, c in members
        )
    )
    if source == "url":
        server.archives["/hostile/1"] = content
        handle = f"{server.url}/hostile/1"
    else:
        (tmp_path / "hostile.tar.gz").write_bytes(content)
        handle = str(tmp_path / "hostile.tar.gz")
    before = links(tmp_path)
    check_error(handle, ValueError, "fetching or unpacking it failed", message)
    assert links(tmp_path) == before  # neither outside nor inside the cache
    assert (tmp_path / "secret").read_text() == "secret"
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["model.tar.gz", "model.tgz"])
def test_an_archive_file_is_unpacked_once_under_its_content(
    name, module_of, loaded_of, tmp_path, monkeypatch
):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    content = pack(module_of("tanh"))
    (tmp_path / name).write_bytes(content)
    check_against_module(bg.BertGenerationEncoder.from_hub(tmp_path / name), loaded_of("tanh"))
    kept = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert [path.name for path in kept] == [hashlib.sha256(content).hexdigest()]
    # Found again by what it holds, under whatever name; another content is another module.
    (kept[0] / "mark").touch()
    (tmp_path / name).rename(tmp_path / "renamed.tgz")
    bg.BertGenerationEncoder.from_hub(tmp_path / "renamed.tgz", verify=False)
    assert (kept[0] / "mark").exists()
    (tmp_path / name).write_bytes(pack(module_of("gelu")))
    assert (
        bg.BertGenerationEncoder.from_hub(tmp_path / name, verify=False).config.hidden_act == "gelu"
    )
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    check_error(
        tmp_path / name, ValueError, "should be a .tar.gz of a TF Hub module, but .* failed"
    )
    check_error(tmp_path / "absent.tar.gz", FileNotFoundError, "or a .tar.gz file of one")


@pytest.fixture
def unset(tmp_path, monkeypatch):
    """No TFHUB_CACHE_DIR, and a home of its own."""
    monkeypatch.delenv("TFHUB_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("xdg", [None, "relative", "XDG"])
def test_without_a_cache_modules_are_kept_for_the_user_alone(xdg, module_of, unset, monkeypatch):
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg.replace("XDG", str(unset / "xdg")))
    content = pack(module_of("tanh"))
    (unset / "model.tar.gz").write_bytes(content)
    umask = os.umask(0)
    try:
        path = fetch.resolve(str(unset / "model.tar.gz"))
    finally:
        os.umask(umask)
    root = unset / ("xdg" if xdg == "XDG" else "home/.cache") / "bertgen_tf/hub"
    assert Path(path) == root / hashlib.sha256(content).hexdigest()
    assert root.stat().st_mode & 0o777 == 0o700
    assert bg.BertGenerationEncoder.from_hub(path, verify=False).config.hidden_act == "gelu_new"

    # A cache that is there already may be read-only.
    with monkeypatch.context() as patch:
        patch.setattr(fetch.downloads, "locked", lambda _: pytest.fail("something is written"))
        assert fetch.resolve(str(unset / "model.tar.gz")) == path

    # What tensorflow_hub fetches itself goes there too, and no setting stays behind.
    monkeypatch.setattr(tensorflow_hub, "resolve", lambda _: resolver.tfhub_cache_dir() + "/own")
    (root / "own").mkdir()
    (root / "own/saved_model.pb").touch()
    assert fetch.resolve("gs://bucket/module.tar.gz") == str(root / "own")
    assert "TFHUB_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(unset))
    (unset / "own").mkdir()
    (unset / "own/saved_model.pb").touch()
    assert fetch.resolve("gs://bucket/module.tar.gz") == str(unset / "own")
    assert os.environ["TFHUB_CACHE_DIR"] == str(unset)


def test_a_cache_that_others_can_write_is_refused(module_of, unset, monkeypatch):
    (unset / "model.tar.gz").write_bytes(pack(module_of("tanh")))
    root = unset / "home/.cache/bertgen_tf/hub"
    root.mkdir(parents=True)
    modes = {0o777: "drwxrwxrwx", 0o770: "drwxrwx---", 0o702: "drwx----w-"}
    for mode, shown in modes.items():
        root.chmod(mode)
        check_error(unset / "model.tar.gz", ValueError, f"writable by nobody .* mode {shown}")
    root.chmod(0o700)
    root.parent.chmod(0o775)  # hub could be renamed
    check_error(unset / "model.tar.gz", ValueError, "bertgen_tf should be a folder of the user's")
    root.parent.chmod(0o755)
    root.rename(unset / "elsewhere")
    root.symlink_to(unset / "elsewhere")
    check_error(unset / "model.tar.gz", ValueError, "hub should be a folder of the user's own")
    root.unlink()
    root.touch()
    check_error(unset / "model.tar.gz", ValueError, "hub should be a folder of the user's own")
    root.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: root.parent.stat().st_uid + 1)
        check_error(unset / "model.tar.gz", ValueError, "should be a folder of the user's own")
    fetch.resolve(str(unset / "model.tar.gz"))
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(unset / "model.tar.gz" / "below"))
    check_error(unset / "model.tar.gz", ValueError, "no folder for that: .*, or set TFHUB_")


def test_no_server_is_there(server):
    server.shutdown()
    server.server_close()
    check_error(f"{server.url}/tiny/1", ValueError, "failed: .*refused")


def test_other_protocols_are_refused():
    check_error("ftp://127.0.0.1/tiny/1", ValueError, "failed")

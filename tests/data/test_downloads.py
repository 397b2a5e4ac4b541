"""Downloads from a server here, which breaks off, changes its mind and cannot go on."""

import contextlib
import hashlib
import http.server
import json
import os
import threading

import pytest

from bertgen_tf.data import downloads

CONTENT = bytes(range(256)) * 5000  # more than one block
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends `server.content`, at most `server.cut` bytes of it at once."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        start = 0
        if server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if self.headers.get("If-Range") != server.tag:
                start = 0
            elif start >= len(server.content):
                self.send_error(416)
                return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            size = len(server.content)
            first = start + server.shift
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.with_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client had enough
            self.wfile.write(body[: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cut, server.tag = CONTENT, None, '"one"'
        server.ranges, server.with_length, server.requests, server.shift = True, True, [], 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path):
    def fetch(*paths, **options):
        urls = [server.url + path for path in paths or ["/file"]]
        downloads.fetch(urls, tmp_path / "file.zip", **{"max_bytes": 2**21, **options})
        return (tmp_path / "file.zip").read_bytes()

    return fetch


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_fetched_once_pinned_and_checked(server, fetch, tmp_path):
    assert fetch() == CONTENT
    assert files(tmp_path) == {"file.zip", "file.zip.json"}
    pin = json.loads((tmp_path / "file.zip.json").read_text())
    assert pin == {"url": f"{server.url}/file", "size": len(CONTENT), "sha256": SHA256}
    assert fetch() == CONTENT
    assert len(server.requests) == 1
    # Of the same size, even.
    (tmp_path / "file.zip").write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ValueError, match=f"file.zip should have the SHA-256 {SHA256}, but was cha"):
        fetch()
    # Fetched anew it must be what it was.
    (tmp_path / "file.zip").unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(
        ValueError, match=f"/file should have the SHA-256 {SHA256}, but what arrived"
    ):
        fetch()
    assert files(tmp_path) == {"file.zip.json"}
    server.content = CONTENT
    assert fetch() == CONTENT


def test_a_known_sum(fetch, tmp_path):
    with pytest.raises(ValueError, match="should have the SHA-256 00, but what arrived has"):
        fetch(sha256="00")
    assert files(tmp_path) == set()
    assert fetch(sha256=SHA256) == CONTENT


@pytest.mark.parametrize("with_length", [True, False])
def test_goes_on_where_it_broke_off(server, fetch, tmp_path, with_length):
    server.cut = 700_000
    with pytest.raises(ConnectionError, match="file.zip could not be fetched: .* broke off after"):
        fetch()
    assert files(tmp_path) == {"file.zip.partial", "file.zip.partial.etag"}
    server.cut, server.with_length = None, with_length
    assert fetch() == CONTENT
    assert server.requests == [("/file", None), ("/file", "bytes=700000-")]
    assert files(tmp_path) == {"file.zip", "file.zip.json"}


@pytest.mark.parametrize("change", ["other file", "weak tag", "no tag", "no ranges"])
def test_begins_anew_where_it_cannot_go_on(server, fetch, change):
    server.cut = 700_000
    server.tag = {"weak tag": 'W/"one"', "no tag": None}.get(change, '"one"')
    server.ranges = change != "no ranges"
    with pytest.raises(ConnectionError):
        fetch()
    server.cut = None
    if change == "other file":
        server.content, server.tag = CONTENT[::-1], '"two"'
    assert fetch() == server.content
    # What only might be the same file, nobody asks the rest of.
    assert (server.requests[-1][1] is None) == (change in ("weak tag", "no tag"))


def test_a_part_that_was_not_asked_for(server, fetch):
    server.cut = 700_000
    with pytest.raises(ConnectionError):
        fetch()
    server.cut, server.shift = None, 1
    with pytest.raises(ConnectionError, match="expected the bytes from 700000 on"):
        fetch()


def test_killed_between_the_last_byte_and_the_name(server, fetch, tmp_path):
    (tmp_path / "file.zip.partial").write_bytes(CONTENT)
    (tmp_path / "file.zip.partial.etag").write_text('"one"')
    assert fetch() == CONTENT
    assert server.requests == [("/file", f"bytes={len(CONTENT)}-"), ("/file", None)]


def test_the_next_url_where_one_is_gone(server, fetch, tmp_path):
    assert fetch("/absent", "/file") == CONTENT
    (tmp_path / "file.zip").unlink()
    with pytest.raises(ConnectionError, match=r"/absent/1: HTTP Error 404.*/absent/2: HTTP Error"):
        fetch("/absent/1", "/absent/2")
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="refused"):
        fetch()


@pytest.mark.parametrize("with_length", [True, False])
def test_no_larger_than_allowed(server, fetch, tmp_path, with_length):
    server.with_length = with_length
    with pytest.raises(ValueError, match="/file has (more than )?1,[0-9]+,000"):
        fetch(max_bytes=1_200_000)
    partial = tmp_path / "file.zip.partial"
    assert not partial.exists() or partial.stat().st_size <= 1_200_000


def test_a_full_disk_is_told_and_leaves_no_file(fetch, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fetch()
    assert not (tmp_path / "file.zip").exists()


def test_a_damaged_pin(fetch, tmp_path):
    fetch()
    (tmp_path / "file.zip.json").write_text("[]")
    with pytest.raises(
        ValueError, match="file.zip.json should contain the sha256 of file.zip, but"
    ):
        fetch()


def test_two_at_a_time_fetch_once(server, fetch):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert len(server.requests) == 1


def test_progress(fetch, monkeypatch, capsys):
    fetch(verbose=1)
    assert "2 of 2 MiB, " in capsys.readouterr().err


def test_https_that_leads_elsewhere_is_refused(tmp_path, monkeypatch):
    class Response(contextlib.nullcontext):
        url, status, headers = "http://example.org/data", 200, {}

    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *args, **kwargs: Response())
    with pytest.raises(ValueError, match="leads to http://example.org/data, which is not HTTPS"):
        downloads.fetch(["https://example.org/data"], tmp_path / "data", max_bytes=9)
    assert not (tmp_path / "data").exists()

"""Browsers as clients: what they say of themselves is checked, by ASGI."""

import asyncio

import pytest

pytest.importorskip("starlette")

from starlette.responses import PlainTextResponse

from bertgen_tf.serving.http.origins import BrowserGuard, check_origin, default_hosts

HERE = "http://localhost:8501"
THERE = "https://example.org"


def ask(method, headers, **options):
    """Status and headers of an answer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    app = BrowserGuard(PlainTextResponse("answered"), **options)
    headers = {"host": "localhost:8501", **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": "/",
        "headers": [(k.encode(), v.encode()) for k, v in headers.items() if v is not None],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8501", 200),
        ("127.0.0.1:8501", 200),
        ("[::1]:8501", 200),
        (None, 200),  # no browser
        ("rebound.example.org:8501", 403),
        ("localhost.example.org", 403),
        ("127.0.0.1.example.org", 403),
        ("example.org@localhost", 200),  # names localhost
        ("localhost@example.org", 403),
        ("[::1", 403),
    ],
)
def test_hosts_on_loopback(host, status):
    for method in ("GET", "POST"):
        headers = {"host": host}
        assert ask(method, headers, allowed_hosts=default_hosts("127.0.0.1"))[0] == status
        assert ask(method, headers)[0] == 200
    # What stands before an @ is no host.
    named = host in (None, "localhost@example.org")
    assert ask("GET", {"host": host}, allowed_hosts=["Example.org"])[0] == (200 if named else 403)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.0.2.7", True),
        ("server.example.org", True),
    ],
)
def test_default_hosts(host, expected):
    assert (default_hosts(host) == ("*",)) == expected


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # curl
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, 200),  # the page
        ({"origin": HERE}, 200),  # that of an old browser
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": THERE, "sec-fetch-site": "cross-site"}, 403),
        ({"origin": THERE}, 403),
        ({"origin": "http://localhost:9999", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "null", "sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),  # a form
        ({"content-length": "3", "transfer-encoding": "chunked"}, 400),
    ],
    ids=range(10),
)
def test_requests_of_pages(headers, status):
    found, answer = ask("POST", headers)
    assert found == status
    assert "access-control-allow-origin" not in answer
    assert (answer.get("connection") == "close") == (status != 200)
    if status == 403:  # a link may lead to the page, whose answer no other page can read
        assert ask("GET", headers)[0] == 200


def test_listed_sites():
    options = {"cors_origins": [THERE]}
    headers = {"origin": THERE, "sec-fetch-site": "cross-site"}
    status, answer = ask("POST", headers, **options)
    assert (status, answer["access-control-allow-origin"]) == (200, THERE)
    asked = {**headers, "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "content-type"
    status, answer = ask("OPTIONS", asked, **options)
    assert status == 200 and "POST" in answer["access-control-allow-methods"]
    for other in ("https://example.org.evil.example", "http://example.org"):
        assert ask("POST", {"origin": other}, **options)[0] == 403
    assert ask("POST", {"origin": "https://any.example"}, cors_origins=["*"])[0] == 200


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "ftp://a", "https://"])
def test_what_is_no_site(origin):
    with pytest.raises(ValueError, match="cors_origins must be sites without a path"):
        check_origin(origin)

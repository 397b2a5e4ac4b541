"""Which hosts and web pages may use the server: a browser is no client unless it is allowed.

A page of another site can make its visitor's browser send requests to this machine. Three things
stop it: names that are not ours are refused (a site can let its own name lead here, "DNS
rebinding"), requests that a browser sends for another site are refused by what it says in `Origin`
and `Sec-Fetch-Site`, and answers carry no permission to be read (CORS) but for listed sites.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
ANY = "*"
_READING = ("GET", "HEAD", "OPTIONS")


def default_hosts(host: str) -> tuple[str, ...]:
    """The names by which clients may call a server on `host`: on loopback a few, else all."""
    return LOOPBACK_HOSTS if _is_loopback(host) else (ANY,)


def check_origin(origin: str) -> str:
    """A site as browsers write it, such as `https://example.org:8080`; or "*".

    Raises:
        ValueError: it is something else.
    """
    if not re.fullmatch(r"\*|https?://[^/\s]+", origin, re.IGNORECASE):
        raise ValueError(
            "cors_origins must be sites without a path, such as https://example.org, or '*', "
            f"received {origin!r}."
        )
    return origin.lower()


class BrowserGuard:
    """An ASGI application that passes on what may be answered, and answers the rest with 403.

    Args:
        app: the application.
        allowed_hosts: names, without port, that the `Host` of a request may have; "*" for all.
        cors_origins: sites whose pages may send requests and read the answers; "*" for all.
    """

    def __init__(
        self,
        app: Callable,
        allowed_hosts: Sequence[str] = (ANY,),
        cors_origins: Sequence[str] = (),
    ):
        self._app = app
        self._hosts = {host.lower() for host in allowed_hosts}
        self._origins = {check_origin(origin) for origin in cors_origins}
        self._with_permission = CORSMiddleware(
            app,
            allow_origins=sorted(self._origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Content-Type", "Content-Encoding"],
        )

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wrong = self._why_not(scope["method"], headers)
        if wrong is not None:
            status, message = wrong
            answer = JSONResponse({"error": message}, status, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        app = self._with_permission if self._is_allowed(headers.get("origin")) else self._app
        await app(scope, receive, send)

    def _why_not(self, method: str, headers: Headers) -> tuple[int, str] | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            # Proxies disagree on where such a body ends: RFC 9112, 6.1.
            return 400, "A request must not have both Content-Length and Transfer-Encoding"
        host = headers.get("host", "")
        if ANY not in self._hosts and host and _name(host) not in self._hosts:
            return 403, (
                f"The host {host[:100]!r} is not allowed: use localhost, or start the server with "
                "--allowed-hosts"
            )
        origin = headers.get("origin")
        if method in _READING or self._is_allowed(origin):
            return None
        own = origin is None or urlsplit(origin).netloc.lower() == host.lower()
        site = headers.get("sec-fetch-site", "same-origin")
        if own and site in ("same-origin", "none"):
            return None
        return 403, (
            "Requests from pages of other sites are not allowed: start the server with "
            "--cors-origin"
        )

    def _is_allowed(self, origin: str | None) -> bool:
        return origin is not None and bool({ANY, origin.lower()} & self._origins)


def _name(host: str) -> str:
    """A `Host` without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:  # brackets that are not closed
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"

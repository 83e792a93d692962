"""A guard in front of a web application that has none of its own: who may ask, from where, and for what.

What it keeps out: pages of other sites and of other ports (they cannot name a token, and browsers say where a request
comes from), names that were made to point here (DNS rebinding), and writing where only reading is allowed.
"""

import logging
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from hmac import compare_digest
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from wsgiref.headers import Headers

from bottle import BaseRequest, HTTPResponse

from hpsearch.errors import HpsearchError

logger = logging.getLogger(__name__)

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

READING = ("GET", "HEAD")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.IGNORECASE)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]+){3}|\[::1\]", re.IGNORECASE)
_DOWNLOADS = ("document", "empty", "image", "video", "audio")  # what an uploaded file may be asked for as


@dataclass(frozen=True)
class AccessControl:
    """A WSGI application that passes on to another one what may pass, and answers everything else with 403.

    `names` are those it may be called by in the Host header, in small letters, without ports. Whoever shows the `token`
    in an address gets the `secret` as the cookie named `cookie`, and nobody passes without; it is not the token, as
    browsers show a cookie to all ports of a host. Only what `writes` matches, as "METHOD /path", may be written, and
    nothing below `closed` is there at all.
    """

    application: Application
    token: str = field(repr=False)
    names: Collection[str]
    cookie: str
    writes: re.Pattern[str] | None = None
    closed: str = "/api/llm"
    secret: str = field(default_factory=secrets.token_urlsafe, repr=False)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")  # the dashboard looks it up unasked
        request = BaseRequest(environ)
        begin = partial(_begin, request, start_response)
        try:
            answer = self._answer(request)
            if answer is None:
                return self.application(environ, begin)
        except Exception as error:
            logger.debug("%s %s failed", request.method, request.path, exc_info=True)
            reason = str(error) if isinstance(error, HpsearchError) else type(error).__name__
            logger.warning("%s %s failed: %s", request.method, request.path, reason)
            answer = _text(500, f"This failed: {reason}")
        begin(answer.status_line, answer.headerlist)
        return [] if request.method == "HEAD" else [str(answer.body).encode()]

    def _answer(self, request: BaseRequest) -> HTTPResponse | None:
        """What this guard itself answers, or nothing where the application may."""
        if not self._is_called_by_name(request):
            return _text(403, "This server is not known by that name; open the address that was printed.")
        if request.path == "/healthz" and request.method in READING:
            return _text(200, "ok")
        if not request.path.isascii() or request.path.startswith(self.closed):
            return _text(403, "There is nothing here.")
        if not _is_from_here(request):
            return _text(403, "Pages of another origin get nothing here.")
        if request.path.startswith("/artifacts/") and request.get_header("Sec-Fetch-Dest", "empty") not in _DOWNLOADS:
            return _text(403, "Uploaded files are saved, and never run.")
        if request.method in READING and "token" in request.query:
            return self._greet(request)
        if not self._has_cookie(request):
            return _text(403, "Open the address that hpsearch printed when it started: it ends in a token.")
        if request.method not in READING and not self._may_write(request):
            takes = "" if self.writes else "; notes and files take: hpsearch dashboard --writable"
            return _text(403, f"This may not be changed here{takes}")
        return None

    def _is_called_by_name(self, request: BaseRequest) -> bool:
        found = _HOST.fullmatch(request.environ.get("HTTP_HOST", ""))
        return found is not None and found[1].lower() in self.names

    def _greet(self, request: BaseRequest) -> HTTPResponse:
        """Give the secret as a cookie, and send on to the same address without the token, lest that be left about."""
        if not compare_digest(request.query["token"].encode(), self.token.encode()):
            return _text(403, "That is the token of another server; open the address that was printed last.")
        rest = urlencode([(key, value) for key, value in request.query.allitems() if key != "token"], encoding="latin1")
        # A browser that follows a link of another site sends no strict cookie along, not even after a redirect of ours,
        # and over plain HTTP it does not say that it follows one; but it does when our own page sends it on.
        answer = _text(200, "")
        answer.set_header("Refresh", f"0; url={quote(request.path)}" + (f"?{rest}" if rest else ""))
        answer.set_cookie(self.cookie, self.secret, path="/", httponly=True, samesite="strict")
        return answer

    def _has_cookie(self, request: BaseRequest) -> bool:
        # Not by Python's own parser: one cookie that it cannot read, of another server of this host, and it drops all.
        ours = f"{self.cookie}={self.secret}".encode()
        cookies = re.split("[;,]", request.environ.get("HTTP_COOKIE", ""))
        return any(compare_digest(cookie.strip().encode(), ours) for cookie in cookies)

    def _may_write(self, request: BaseRequest) -> bool:
        is_allowed = self.writes is not None and self.writes.fullmatch(f"{request.method} {request.path}")
        return bool(is_allowed) and "HTTP_ORIGIN" in request.environ


def _is_from_here(request: BaseRequest) -> bool:
    """Whether no page of another origin made the request, as far as browsers say; following a link is allowed."""
    origin = request.get_header("Origin")
    own = f"{request.environ['wsgi.url_scheme']}://{request.environ['HTTP_HOST']}"
    if origin is not None and origin.lower() != own.lower():
        return False
    if request.get_header("Sec-Fetch-Site", "none") in ("none", "same-origin"):
        return True
    mode, place = request.get_header("Sec-Fetch-Mode"), request.get_header("Sec-Fetch-Dest")
    return request.method == "GET" and (mode, place) == ("navigate", "document")


def _begin(
    request: BaseRequest, start_response: Callable[..., Any], status: str, headers: list[tuple[str, str]], *error: Any
) -> Any:
    """Start the response with headers that keep it to itself."""
    found = Headers([(name, value) for name, value in headers if not name.lower().startswith("access-control-")])
    for name, value in _HEADERS.items():
        found[name] = value
    if _is_trustworthy(request):
        found["Cross-Origin-Opener-Policy"] = "same-origin"  # elsewhere browsers complain about it
    if not request.path.startswith("/static/"):
        found["Cache-Control"] = "no-store"
    policy = found["Content-Security-Policy"] or "default-src 'self'"
    found["Content-Security-Policy"] = f"{policy};base-uri 'none';form-action 'self';frame-ancestors 'none'"
    if request.path.startswith("/artifacts/"):  # what somebody uploaded is saved, and never run
        found["Content-Security-Policy"] = "sandbox; default-src 'none'"
        found["Content-Disposition"] = "attachment"
    if place := found["Location"]:  # a proxy may know this server by another name
        found["Location"] = urlsplit(place)._replace(scheme="", netloc="").geturl()
    return start_response(status, found.items(), *error)


def _is_trustworthy(request: BaseRequest) -> bool:
    """Whether browsers count on nobody between them and this server."""
    found = _HOST.fullmatch(request.environ.get("HTTP_HOST", ""))
    is_here = found is not None and _LOOPBACK.fullmatch(found[1]) is not None
    return is_here or request.environ["wsgi.url_scheme"] == "https"


def _text(status: int, text: str) -> HTTPResponse:
    return HTTPResponse(f"{text}\n" if text else "", status, content_type="text/plain; charset=utf-8")

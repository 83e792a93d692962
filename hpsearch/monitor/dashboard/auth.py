"""Access control for a web application that has none.

It rejects pages of other sites and ports (they lack the token, and browsers report the origin of a request), unknown
host names (DNS rebinding), and writes to a read-only application.
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
_DOWNLOADS = ("document", "empty", "image", "video", "audio")  # the destinations for which uploaded files are served


@dataclass(frozen=True)
class AccessControl:
    """A WSGI middleware that forwards permitted requests and answers all others with 403.

    `names` are the accepted host names, in lower case and without ports. A request with the `token` in its URL receives
    the `secret` in the cookie named `cookie`, which all other requests need. The cookie does not hold the token itself,
    because browsers send a cookie to all ports of a host. Writes must match `writes` as "METHOD /path". Paths below
    `closed` are never served.
    """

    application: Application
    token: str = field(repr=False)
    names: Collection[str]
    cookie: str
    writes: re.Pattern[str] | None = None
    closed: str = "/api/llm"
    secret: str = field(default_factory=secrets.token_urlsafe, repr=False)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")  # the dashboard requires this header
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
            answer = _text(500, f"Server error: {reason}")
        begin(answer.status_line, answer.headerlist)
        return [] if request.method == "HEAD" else [str(answer.body).encode()]

    def _answer(self, request: BaseRequest) -> HTTPResponse | None:
        """The response that rejects or redirects the request, or None to forward it."""
        if not self._is_called_by_name(request):
            return _text(403, "Unknown host name. Open the URL that hpsearch printed.")
        if request.path == "/healthz" and request.method in READING:
            return _text(200, "ok")
        if not request.path.isascii() or request.path.startswith(self.closed):
            return _text(403, "Not available.")
        if not _is_same_origin(request):
            return _text(403, "Cross-origin requests are not allowed.")
        if request.path.startswith("/artifacts/") and request.get_header("Sec-Fetch-Dest", "empty") not in _DOWNLOADS:
            return _text(403, "Uploaded files can only be downloaded, not opened in the browser.")
        if request.method in READING and "token" in request.query:
            return self._greet(request)
        if not self._has_cookie(request):
            return _text(403, "Access token missing. Open the full URL that hpsearch printed, including ?token=...")
        if request.method not in READING and not self._may_write(request):
            if self.writes:
                return _text(403, "This cannot be changed in the dashboard.")
            return _text(403, "This dashboard is read-only. To edit notes and files, start it with --writable.")
        return None

    def _is_called_by_name(self, request: BaseRequest) -> bool:
        found = _HOST.fullmatch(request.environ.get("HTTP_HOST", ""))
        return found is not None and found[1].lower() in self.names

    def _greet(self, request: BaseRequest) -> HTTPResponse:
        """Set the cookie and redirect to the same URL without the token, so that it does not stay in the history."""
        if not compare_digest(request.query["token"].encode(), self.token.encode()):
            return _text(403, "Wrong or expired token. Open the URL that hpsearch printed most recently.")
        rest = urlencode([(key, value) for key, value in request.query.allitems() if key != "token"], encoding="latin1")
        # After a link from another site, browsers send no strict cookie, not even after a redirect by this server. They
        # do send it when a page of this server refreshes to the URL.
        answer = _text(200, "")
        answer.set_header("Refresh", f"0; url={quote(request.path)}" + (f"?{rest}" if rest else ""))
        answer.set_cookie(self.cookie, self.secret, path="/", httponly=True, samesite="strict")
        return answer

    def _has_cookie(self, request: BaseRequest) -> bool:
        # Python's cookie parser drops all cookies if one of them (of another server on this host) is malformed.
        ours = f"{self.cookie}={self.secret}".encode()
        cookies = re.split("[;,]", request.environ.get("HTTP_COOKIE", ""))
        return any(compare_digest(cookie.strip().encode(), ours) for cookie in cookies)

    def _may_write(self, request: BaseRequest) -> bool:
        is_allowed = self.writes is not None and self.writes.fullmatch(f"{request.method} {request.path}")
        return bool(is_allowed) and "HTTP_ORIGIN" in request.environ


def _is_same_origin(request: BaseRequest) -> bool:
    """Return whether the browser reports no foreign origin for the request. Following a link is allowed."""
    origin = request.get_header("Origin")
    own = f"{request.environ['wsgi.url_scheme']}://{request.environ['HTTP_HOST']}"
    if origin is not None and origin.lower() != own.lower():
        return False
    if request.get_header("Sec-Fetch-Site", "none") in ("none", "same-origin"):
        return True
    mode, destination = request.get_header("Sec-Fetch-Mode"), request.get_header("Sec-Fetch-Dest")
    return request.method == "GET" and (mode, destination) == ("navigate", "document")


def _begin(
    request: BaseRequest, start_response: Callable[..., Any], status: str, headers: list[tuple[str, str]], *error: Any
) -> Any:
    """Start the response with additional security headers."""
    found = Headers([(name, value) for name, value in headers if not name.lower().startswith("access-control-")])
    for name, value in _HEADERS.items():
        found[name] = value
    if _is_trustworthy(request):
        found["Cross-Origin-Opener-Policy"] = "same-origin"  # on untrusted origins browsers warn about it
    if not request.path.startswith("/static/"):
        found["Cache-Control"] = "no-store"
    policy = found["Content-Security-Policy"] or "default-src 'self'"
    found["Content-Security-Policy"] = f"{policy};base-uri 'none';form-action 'self';frame-ancestors 'none'"
    if request.path.startswith("/artifacts/"):  # uploaded files are downloaded, never executed
        found["Content-Security-Policy"] = "sandbox; default-src 'none'"
        found["Content-Disposition"] = "attachment"
    if location := found["Location"]:  # behind a proxy, this server has another name
        found["Location"] = urlsplit(location)._replace(scheme="", netloc="").geturl()
    return start_response(status, found.items(), *error)


def _is_trustworthy(request: BaseRequest) -> bool:
    """Return whether browsers treat the origin as trustworthy: HTTPS or the loopback address."""
    found = _HOST.fullmatch(request.environ.get("HTTP_HOST", ""))
    is_loopback = found is not None and _LOOPBACK.fullmatch(found[1]) is not None
    return is_loopback or request.environ["wsgi.url_scheme"] == "https"


def _text(status: int, text: str) -> HTTPResponse:
    return HTTPResponse(f"{text}\n" if text else "", status, content_type="text/plain; charset=utf-8")

"""Access control for Optuna's dashboard, which has none: who has the token may read, and nobody may write."""

import json
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
# What the page reads. Everything else of Optuna's dashboard writes, serves uploaded files or asks a language model.
_ROUTES = re.compile(
    r"/|/favicon\.ico|/(dashboard|static)(/.*)?|/csv/[0-9]+"
    r"|/api/(meta|studies(/[0-9]+(/param_importances|/plot/[a-z_]+)?)?)"
)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.IGNORECASE)
_LOOPBACK = re.compile(r"localhost|127(\.[0-9]+){3}|\[::1\]")
_HEADERS = {  # pages of other origins, other ports of this host included, can neither load nor frame anything
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class AccessControl:
    """A WSGI middleware that forwards GET and HEAD requests of known routes, and answers all others with 403.

    `names` are the accepted host names, in lower case and without ports: a page whose name was made to resolve to this
    machine (DNS rebinding) is refused. A request with the `token` in its URL receives the `secret` in the cookie named
    `cookie`, which all other requests need. The cookie does not hold the token itself, because browsers send a cookie
    to all ports of a host.
    """

    application: Application
    token: str = field(repr=False)
    names: Collection[str]
    cookie: str
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
        if _host_name(request) not in self.names:
            return _text(403, "Unknown host name. Open the URL that hpsearch printed.")
        if request.method not in READING:
            # The page shows the reason.
            reason = "This dashboard is read-only. To edit notes, start optuna-dashboard on the database."
            return HTTPResponse(json.dumps({"reason": reason}), 403, content_type="application/json")
        if request.path == "/healthz":
            return _text(200, "ok")
        if "token" in request.query:
            return self._greet(request)
        if not self._has_cookie(request):
            return _text(403, "Access token missing. Open the full URL that hpsearch printed, including ?token=...")
        return None if _ROUTES.fullmatch(request.path) else _text(403, "Not available.")

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


def _host_name(request: BaseRequest) -> str:
    """The name by which the request calls this server, in lower case and without the port, or ""."""
    found = _HOST.fullmatch(request.environ.get("HTTP_HOST", ""))
    return found[1].lower() if found else ""


def _begin(
    request: BaseRequest, start_response: Callable[..., Any], status: str, headers: list[tuple[str, str]], *error: Any
) -> Any:
    """Start the response with additional security headers."""
    found = Headers([*headers, *_HEADERS.items()])
    if _LOOPBACK.fullmatch(_host_name(request)):  # without TLS, browsers warn about it on other hosts
        found["Cross-Origin-Opener-Policy"] = "same-origin"
    if not request.path.startswith("/static/"):
        found["Cache-Control"] = "no-store"
    policy = found["Content-Security-Policy"] or "default-src 'self'"
    found["Content-Security-Policy"] = f"{policy};base-uri 'none';form-action 'self';frame-ancestors 'none'"
    if location := found["Location"]:  # behind a proxy, this server has another name
        found["Location"] = urlsplit(location)._replace(scheme="", netloc="").geturl()
    return start_response(status, found.items(), *error)


def _text(status: int, text: str) -> HTTPResponse:
    return HTTPResponse(f"{text}\n" if text else "", status, content_type="text/plain; charset=utf-8")

"""Parses the URLs of databases and artifact stores, hides their passwords, and expands `~` in paths."""

import os
import re

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpsearch.errors import UsageError


def parse_url(url: str) -> URL:
    """Parse the URL of a database that workers can share. Raises `UsageError` for any other URL.

    A SQLite URL is a path without options: a `?` belongs to the file's name, and a leading `~` is the home folder.
    """
    try:
        parsed = _parse(url)
    except (ArgumentError, ValueError):
        # Do not repeat the URL or SQLAlchemy's error: either may contain parts of a password.
        raise UsageError(
            "invalid database URL; expected e.g. sqlite:///study.db or postgresql://user@host/dbname"
        ) from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return _check_path(parsed, url)
    if "@" in (parsed.host or ""):
        raise UsageError("the database URL contains more than one '@'; encode an '@' in the password as %40")
    if backend != "postgresql":
        raise UsageError(f"{show_url(parsed)}: unsupported database '{backend}'; use SQLite or PostgreSQL")
    return parsed.set(drivername="postgresql+psycopg")


def _check_path(parsed: URL, url: str) -> URL:
    if parsed.host:
        raise UsageError("a SQLite URL has three slashes before a path, e.g. sqlite:///study.db")
    if re.search(r"\?\w+=", url):
        raise UsageError("a SQLite URL takes no options; remove them, or write %3F for a '?' in the file's name")
    if parsed.database in (None, "", ":memory:"):
        raise UsageError("an in-memory SQLite database cannot be shared between workers; use sqlite:///study.db")
    return parsed.set(database=expand_home(str(parsed.database)))


def expand_home(path: str) -> str:
    """Return the path with the home folder for a leading `~`. Raises `UsageError` if that folder is unknown."""
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path would drop the ./ of ./~
    if expanded.startswith("~"):
        raise UsageError(
            f"{path}: the home folder {path.partition('/')[0]} is unknown; set HOME, or give the full path"
        )
    return expanded


def show_url(url: URL | str) -> str:
    """Return the URL with its passwords hidden."""
    parsed = _parse(url)
    hidden = dict.fromkeys(filter(_is_secret, parsed.query), "hidden")
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def find_secrets(url: URL | str) -> list[str]:
    """Return the passwords in a URL."""
    parsed = _parse(url)
    found = [parsed.password, *(value for key, value in parsed.query.items() if _is_secret(key))]
    return [str(secret) for secret in found if secret]


def remove_secrets(url: str) -> str:
    """Return the URL without its passwords."""
    parsed = _parse(url)
    parsed = parsed.difference_update_query(filter(_is_secret, parsed.query))
    return parsed._replace(password=None).render_as_string()


def _parse(url: URL | str) -> URL:
    if isinstance(url, str) and url.startswith(("sqlite:", "sqlite+")):
        url = url.replace("?", "%3F")  # SQLAlchemy would drop what follows
    return make_url(url)


def _is_secret(key: str) -> bool:
    return key != "passfile" and any(word in key for word in ("pass", "secret", "scram_"))


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a local folder."""
    return "://" in location

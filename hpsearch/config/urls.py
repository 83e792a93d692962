"""Parses the URLs of databases and artifact stores, and hides their passwords."""

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpsearch.errors import UsageError


def parse_url(url: str) -> URL:
    """Parse the URL of a database that workers can share. Raises `UsageError` for any other URL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Do not repeat the URL or SQLAlchemy's error: either may contain parts of a password.
        raise UsageError(
            "invalid database URL; expected e.g. sqlite:///study.db or postgresql://user@host/dbname"
        ) from None
    backend = parsed.get_backend_name()
    if "@" in (parsed.host or ""):
        raise UsageError("the database URL contains more than one '@'; encode an '@' in the password as %40")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UsageError(f"{show_url(parsed)}: unsupported database '{backend}'; use SQLite or PostgreSQL")
    if parsed.database in (None, "", ":memory:"):
        raise UsageError("an in-memory SQLite database cannot be shared between workers; use sqlite:///study.db")
    return parsed


def show_url(url: URL | str) -> str:
    """Return the URL with its passwords hidden."""
    parsed = make_url(url)
    hidden = dict.fromkeys(filter(_is_secret, parsed.query), "hidden")
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def find_secrets(url: URL | str) -> list[str]:
    """Return the passwords in a URL."""
    parsed = make_url(url)
    found = [parsed.password, *(value for key, value in parsed.query.items() if _is_secret(key))]
    return [str(secret) for secret in found if secret]


def remove_secrets(url: str) -> str:
    """Return the URL without its passwords."""
    parsed = make_url(url)
    parsed = parsed.difference_update_query(filter(_is_secret, parsed.query))
    return parsed._replace(password=None).render_as_string()


def _is_secret(key: str) -> bool:
    return "pass" in key and key != "passfile"


def is_url(location: str) -> bool:
    """Return whether a location is a URL, not a local folder."""
    return "://" in location

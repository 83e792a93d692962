"""URLs of databases and artifact stores: parsed, and shown without passwords."""

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from hpsearch.errors import UsageError


def parse_url(url: str) -> URL:
    """The URL of a database that workers can share; raises `UsageError` for any other."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Neither the URL nor SQLAlchemy's error is repeated: a part of a password may stand anywhere in them.
        raise UsageError(
            "the storage must be a URL such as sqlite:///study.db or postgresql://user@host/name"
        ) from None
    backend = parsed.get_backend_name()
    if "@" in (parsed.host or ""):
        raise UsageError("the storage's URL has more than one @; write one in a password as %40")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UsageError(f"{show_url(parsed)}: use SQLite or PostgreSQL, not {backend}")
    if parsed.database in (None, "", ":memory:"):
        raise UsageError("a SQLite database in memory cannot be shared by workers; name a file: sqlite:///study.db")
    return parsed


def show_url(url: URL | str) -> str:
    """The URL as it may be printed, its passwords hidden."""
    parsed = make_url(url)
    hidden = dict.fromkeys(filter(_is_secret, parsed.query), "hidden")
    return parsed.update_query_dict(hidden).render_as_string(hide_password=True)


def find_secrets(url: URL | str) -> list[str]:
    """The passwords in a URL."""
    parsed = make_url(url)
    found = [parsed.password, *(value for key, value in parsed.query.items() if _is_secret(key))]
    return [str(secret) for secret in found if secret]


def remove_secrets(url: str) -> str:
    """The URL without its passwords."""
    parsed = make_url(url)
    parsed = parsed.difference_update_query(filter(_is_secret, parsed.query))
    return parsed._replace(password=None).render_as_string()


def _is_secret(key: str) -> bool:
    return "pass" in key and key != "passfile"


def is_url(place: str) -> bool:
    """Whether a place is a store by URL rather than a folder of this machine."""
    return "://" in place

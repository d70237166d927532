"""No credential of an address leaves the process, and an address without its credentials still leads somewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpdit.redact import one_line, redact_uri, without_stars

SECRET = "open-sesame"


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("http://me:pw@host:5000/x", "http://***@host:5000/x"),
        ("http://me:p@w@host", "http://***@host"),
        ("https://token@host/?api_key=abc&x=1", "https://***@host/?api_key=***&x=***"),
        ("postgresql+psycopg2://me:p%40w@db/runs?sslmode=require", "postgresql+psycopg2://***@db/runs?sslmode=***"),
        ("http://it's:me@host", "http://***@host"),
        ("mlflow_uri: 'http://me:pw@host?t=a'\nnext: 1", "mlflow_uri: 'http://***@host?t=***'\nnext: 1"),
        ("sqlite:////data/a@b/mlflow.db?timeout=1", "sqlite:////data/a@b/mlflow.db?timeout=1"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("a cat @ home?a=b", "a cat @ home?a=b"),
    ],
)
def test_redact_uri(uri: str, told: str) -> None:
    assert redact_uri(uri) == told


@pytest.mark.parametrize(
    ("starred", "bare"),
    [
        ("http://***@host:5000/x", "http://host:5000/x"),
        ("https://***@host/?api_key=***&x=***", "https://host/"),
        ("https://host/?a=1&k=***&b=2", "https://host/?a=1&b=2"),
        ("postgresql://***@db/runs?sslmode=***", "postgresql://db/runs"),
        ("http://host:5000", "http://host:5000"),
        ("http://me:pw@host?t=a", "http://me:pw@host?t=a"),
        ("sqlite:////data/mlflow.db?timeout=1", "sqlite:////data/mlflow.db?timeout=1"),
        ("databricks", "databricks"),
    ],
)
def test_stars_are_not_sent_as_a_password(starred: str, bare: str) -> None:
    assert without_stars(starred) == bare


NAMES = st.text(st.sampled_from("abcXYZ0189._~-%+!$*"), min_size=1, max_size=12)


@given(user=NAMES, password=NAMES, key=NAMES, host=st.sampled_from(["h", "db.example:5000"]))
def test_what_is_left_of_an_address_is_the_address(user: str, password: str, key: str, host: str) -> None:
    assert without_stars(redact_uri(f"http://{user}:{password}@{host}/a?k={key}")) == f"http://{host}/a"


def test_an_error_that_repeats_the_password_alone_is_starred_too() -> None:
    uri = f"http://me:{SECRET}%21@host/?token=t{SECRET}"
    error = ValueError(f"login as me\nwith {SECRET}! or {SECRET}%21 or t{SECRET} at {uri} failed" + 400 * "x")
    said = one_line(error, uri)
    assert SECRET not in said
    assert said.startswith("login as me with *** or *** or *** at http://***@host/?token=*** failed")
    assert len(said) <= 304

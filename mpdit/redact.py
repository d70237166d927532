"""Credentials in addresses: starred wherever text leaves the process, and taken out of an address that was starred."""

import re
from urllib.parse import unquote

_URI = re.compile(r"(?i)\b(?!(?:sqlite|file)://)([a-z][a-z0-9+.-]*://)(\S+?)(?=['\")\]}>,;.]*(?:\s|$))")
_STARS = "***"


def redact_uri(text: str) -> str:
    """`text` with the user, password and query values of every URI in it starred; files and sqlite stores stay.

    Errs on the side of hiding: everything before the last "@" of a URI goes.
    """

    def hide(match: re.Match[str]) -> str:
        rest = re.sub(r"^.*@", f"{_STARS}@", match[2])
        return match[1] + re.sub(r"([?&#;][^=&#;]*=)[^&#;]*", rf"\1{_STARS}", rest)

    return _URI.sub(hide, text)


def without_stars(uri: str) -> str:
    """A URI out of a run folder with what :func:`redact_uri` starred left out, not sent as if it were a password.

    What it leaves lets a client look for credentials where it does without: MLflow in MLFLOW_TRACKING_USERNAME,
    _PASSWORD and _TOKEN, PostgreSQL's in ~/.pgpass.
    """
    stars = re.escape(_STARS)
    bare = re.sub(rf"://{stars}@", "://", uri)
    bare = re.sub(rf"([?&#;])[^=&#;]*={stars}[^&#;]*", r"\1", bare)
    return re.sub(r"[?&#;]+$", "", re.sub(r"([?&;])[?&;]+", r"\1", bare))


def one_line(error: BaseException, uri: str = "") -> str:
    """What `error` says, in at most 300 characters, without what is secret in `uri`."""
    text = redact_uri(" ".join(str(error).split()))
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        text = text.replace(secret, _STARS)
    return text if len(text) <= 300 else text[:300] + " ..."


def _secrets(uri: str) -> set[str]:
    """The parts of `uri` that :func:`redact_uri` hides, as they may turn up alone in an error's text."""
    match = _URI.search(uri)
    if not match:
        return set()
    user, _, password = match[2].rpartition("@")[0].partition(":")
    found = {password or user, *re.findall(r"[?&#;][^=&#;]*=([^&#;]*)", match[2])}
    return {text for part in found for text in (part, unquote(part)) if len(text) > 3}

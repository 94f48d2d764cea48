"""Tells an inference engine that a version can be pulled: one HTTP POST, its path and body the user's."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from headwater.errors import ConfigurationError, WeightsError

BODY = '{"source_dir": "{directory}", "target_version": {version}}'
"""What SGLang's `pull_weights` takes."""

_DEADLINE_S = 30.0
_FIELDS = ("version", "directory", "path")


@dataclass(frozen=True, slots=True)
class Notification:
    """Where to post, and what.

    Attributes:
        url: http or https, with the path of the endpoint, such as `http://engine:30000/pull_weights`.
        body: JSON with `{version}` (its number), `{directory}` (all versions) and `{path}` (this one) to be
            replaced; the default is what SGLang's `pull_weights` takes.
        deadline: seconds that a post may take.

    Raises:
        ConfigurationError: the address is not http or https, the body no JSON, or the deadline not positive.
    """

    url: str
    body: str = BODY
    deadline: float = _DEADLINE_S

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigurationError(f"notify: got {self.url!r}, expected http://HOST:PORT/PATH")
        try:
            msgspec.json.decode(self.text(1, "directory", "path"))
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"notify: the body is no JSON: {error}") from error
        if not 0 < self.deadline < 86_400:
            raise ConfigurationError(f"notify: deadline must be seconds > 0, got {self.deadline!r}")

    def text(self, version: int, directory: str, path: str) -> bytes:
        """The body for one version."""
        values = {"version": str(version), "directory": directory, "path": path}
        text = self.body
        for field in _FIELDS:
            quoted = msgspec.json.encode(values[field]).decode()[1:-1]
            text = text.replace("{" + field + "}", quoted)
        return text.encode()

    def post(self, version: int, directory: str, path: str) -> int:
        """Post; blocks for the answer and returns its status.

        Raises:
            WeightsError: nobody answers in time, or the answer is not 2xx.
        """
        request = urllib.request.Request(
            self.url,
            data=self.text(version, directory, path),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self.deadline) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            raise WeightsError(f"{self.url} answered {error.code} to version {version}") from error
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.url} could not be told of version {version}: {error}") from error

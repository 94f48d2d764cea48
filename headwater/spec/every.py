"""How often something is done: after so many commits, or so many seconds."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.errors import ConfigurationError
from headwater.spec.seconds import seconds
from headwater.spec.words import option


@dataclass(frozen=True, slots=True)
class Every:
    """Every `versions` commits, or every `seconds`; exactly one of them is set."""

    versions: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str | int | float | Every) -> Every:
        """From "100", "100steps" or 100 (commits), or "30s" (seconds).

        Raises:
            ConfigurationError: not one of these, or not above 0.
        """
        if isinstance(text, Every):
            return text
        plain = str(text).strip().removesuffix("steps").strip()
        try:
            timed = plain.endswith("s")
            every = cls(seconds=float(plain[:-1])) if timed else cls(versions=int(plain))
        except ValueError:
            every = cls()
        if not 0 < every.versions < 2**63 and not every.seconds > 0:
            raise ConfigurationError(
                f"{option('every')}: got {text!r}, expected commits such as 100 or seconds such as '30s'"
            )
        if every.seconds:
            seconds(option("every"), every.seconds)
        return every

    def __str__(self) -> str:
        return f"{self.seconds:g}s" if self.seconds else f"{self.versions}steps"

"""Can a rule be run? Found out when it is declared, not in the middle of a commit.

A user's rule may have a function that cannot be compiled, or scalars that fail for some count of updates. A
server that met that while it applies an entry of the log would end, and so would every one after it.
"""

from __future__ import annotations

from collections.abc import Callable

from headwater.errors import ConfigurationError, HeadwaterError
from headwater.spec.rules import Rule, evaluated

_TRIED = (*range(1000), 10**4, 10**5, 10**6)
"""Counts of updates for which scalars are computed beforehand: failures beyond are found by their commit."""


def is_our_own(rule: Rule) -> bool:
    """Whether it is one of Headwater's rules, whose scalars never fail."""
    return type(rule).__module__.startswith(_OUR_OWN)


_OUR_OWN = "headwater.spec.rules."


def check_runs(rule: Rule, compiled: Callable[[Rule], object]) -> None:
    """Compile the rule's pass, and compute its scalars for many counts; blocks for that.

    Raises:
        ConfigurationError: it cannot be run; says what of it fails.
    """
    try:
        compiled(rule)
    except HeadwaterError:
        raise
    except Exception as error:  # whatever a user's methods raise, and the compiler on their account
        reason = str(error).strip().splitlines() or [""]
        raise ConfigurationError(
            f"rule {rule.name} cannot be compiled: {type(error).__name__}: {reason[0]}"
        ) from error
    if not is_our_own(rule):
        width = len(evaluated(rule, 0, 1))
        for updates in _TRIED:
            if len(evaluated(rule, updates, updates + 1)) != width:
                raise ConfigurationError(
                    f"rule {rule.name}: scalars({updates}, {updates + 1}) has another length than "
                    f"scalars(0, 1), which has {width}"
                )

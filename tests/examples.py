"""How many examples hypothesis takes: few in every run, ten times as many every night."""

from hypothesis import settings

NIGHTLY = settings.get_current_profile_name() == "nightly"


def examples(count, **more):
    """Settings for `count` examples of which none has a deadline, as machines are busy."""
    return settings(max_examples=count * (10 if NIGHTLY else 1), deadline=None, **more)

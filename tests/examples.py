"""How many examples hypothesis takes: few in every run, more with `--long`, and most every night."""

from hypothesis import settings

SHARE = {"default": 0.4, "long": 1, "nightly": 10}[settings.get_current_profile_name()]


def examples(count, **more):
    """Settings for `count` examples with `--long`, of which none has a deadline, as machines are busy."""
    return settings(max_examples=max(4, round(count * SHARE)), deadline=None, **more)

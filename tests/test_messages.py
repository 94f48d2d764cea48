"""The vocabulary of the wire: closed unions, and one place for every name."""

import importlib
import pkgutil
import typing

import msgspec
import pytest

from headwater import messages as m
from headwater.errors import ProtocolError
from headwater.messages.base import Message
from headwater.wire.frames import decode_header

MODULES = [
    importlib.import_module(f"headwater.messages.{one.name}") for one in pkgutil.iter_modules(m.__path__)
]


def own(module):
    """The structs that a module defines."""
    return {
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value.__module__ == module.__name__
    }


def test_every_message_may_cross_a_connection_and_nothing_else():
    messages = {one for module in MODULES for one in own(module) if issubclass(one, Message)} - {Message}
    assert set(typing.get_args(m.AnyMessage)) == messages


def test_every_name_stands_once_and_in_the_package_too():
    names = [one.__name__ for module in MODULES for one in own(module)]
    assert len(names) == len(set(names))
    for module in MODULES:
        for one in own(module):
            assert getattr(m, one.__name__) is one


def test_every_entry_is_one_that_the_log_may_have():
    assert set(typing.get_args(m.AnyEntry)) == {one for one in own(m.log) if issubclass(one, m.Entry)} - {
        m.Entry
    }


def test_what_is_no_message_is_not_decoded():
    with pytest.raises(ProtocolError, match="no known message"):
        decode_header(msgspec.msgpack.encode(m.Held(1, 1, "step")))

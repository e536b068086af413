"""Checks of values that come from outside, for every decoder; without torch, so that any process can use them."""

from typing import TypeGuard

MAX_INTEGER = 2**63 - 1
MAX_NAME_LENGTH = 64


def is_integer(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether `value` is an `int` (not a bool) in [least, 2^63)."""
    return type(value) is int and least <= value <= MAX_INTEGER


def is_name(value: object) -> bool:
    """Whether `value` is a printable ASCII name of at most `MAX_NAME_LENGTH` characters, without blanks."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_NAME_LENGTH
        and value.isascii()
        and value.isprintable()
        and " " not in value
    )

"""One command line flag: its names, type, limits and policy, and how a text becomes its value.

The table of all flags is in flags.py; where values come from is decided in config.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from headgate.launcher.errors import LaunchError

FlagValue = str | int | float | bool | tuple[str, ...] | None

_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})
_SERVICE_LINK = re.compile(r"^(tcp|udp|sctp)://")


class Policy(Enum):
    """What a flag or a variable of the environment does."""

    WORKS = "works"
    ALIAS = "alias"
    NO_OP = "no effect, one warning"
    REFUSED = "refused"


class Kind(Enum):
    """The type of a flag's value."""

    TEXT = "text"
    PATH = "path"
    INTEGER = "integer"
    NUMBER = "number"
    PORT = "port"
    BOOLEAN = "true or false"
    SWITCH = "switch"  # takes no value on the command line
    LIST = "list"  # repeatable; comma-separated in the environment


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table of flags."""

    name: str  # without the leading dashes
    kind: Kind
    help: str  # one sentence
    default: FlagValue = None  # None: unset, or worked out at start
    default_text: str = ""  # how the documents describe a default that is worked out
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    short: str = ""  # one letter
    policy: Policy = Policy.WORKS
    note: str = ""  # NO_OP: why it has no effect; REFUSED: why it cannot be served; ALIAS: of what
    neutral: tuple[FlagValue, ...] = ()  # values as good as absent, for NO_OP and REFUSED
    refused_values: tuple[str, ...] = ()  # values of a working flag that cannot be served
    env_name: str = ""  # where it differs from the name in upper case
    env_aliases: tuple[str, ...] = ()  # other variables, read after the flag's own
    env_before: tuple[str, ...] = ()  # a platform's variables, read before it
    has_env: bool = True
    own: bool = False  # Headgate's own, not one of TGI's

    @property
    def key(self) -> str:
        """The flag's name as a Python identifier."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        """The environment variable, empty if there is none."""
        return (self.env_name or self.key.upper()) if self.has_env else ""

    @property
    def default_shown(self) -> str:
        """The default for people."""
        if self.default_text:
            return self.default_text
        if self.default in (None, "", ()):
            return "unset"
        if isinstance(self.default, bool):
            return "true" if self.default else "false"
        return str(self.default)


def is_service_link(flag: Flag, text: str) -> bool:
    """Whether Kubernetes put `text` there for a service of that name (PORT=tcp://10.0.0.1:80)."""
    return flag.kind is Kind.PORT and bool(_SERVICE_LINK.match(text))


def parse_bool(text: str) -> bool:
    """Everything but the usual words for no means yes, as in TGI."""
    return text.strip().lower() not in _FALSE


def parse_value(flag: Flag, text: str, source: str) -> FlagValue:
    """Turns a text into the flag's value.

    `source` is how the user gave it ("--port" or "PORT"). Raises LaunchError, one sentence
    that names source, value and limit.
    """
    if flag.kind is Kind.SWITCH:
        return parse_bool(text)
    if flag.kind is Kind.BOOLEAN:
        if text.strip().lower() not in _FALSE | {"1", "true", "t", "yes", "y", "on"}:
            raise LaunchError(f"{source} must be true or false, not {text!r}.")
        return parse_bool(text)
    if flag.kind is Kind.LIST:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    if flag.kind in (Kind.INTEGER, Kind.PORT):
        return _number(flag, text, source, int)
    if flag.kind is Kind.NUMBER:
        return _number(flag, text, source, float)
    if flag.choices and text not in flag.choices:
        raise LaunchError(f"{source} must be one of {', '.join(flag.choices)}, not {text!r}.")
    return text


def _number(flag: Flag, text: str, source: str, convert: type[int] | type[float]) -> int | float:
    word = "a whole number" if convert is int else "a number"
    try:
        value = convert(text.strip())
    except ValueError:
        raise LaunchError(f"{source} must be {word}, not {text!r}.") from None
    low, high = flag.minimum, flag.maximum
    if flag.kind is Kind.PORT:
        low, high = 0, 65535
    too_low = low is not None and not value >= low
    too_high = high is not None and not value <= high
    if too_low or too_high or value != value:
        raise LaunchError(f"{source} must be {word} {_limits(low, high)}, not {text.strip()}.")
    return value


def _limits(low: float | None, high: float | None) -> str:
    if low is None:
        return f"of at most {high:g}"
    if high is None:
        return f"of at least {low:g}"
    return f"from {low:g} to {high:g}"

"""Errors that reach the user as one clear line."""


class ConfigError(ValueError):
    """A configuration value that cannot work: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r}: expected {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class TargetError(RuntimeError):
    """A target's own code raised, or returned something that is not a log density or a score."""


class PluginError(RuntimeError):
    """A plug-in (actor, refiner, objective) raised, or returned something that does not follow its interface."""


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise `ConfigError(field, value, allowed)` unless the condition holds."""
    if not condition:
        raise ConfigError(field, value, allowed)

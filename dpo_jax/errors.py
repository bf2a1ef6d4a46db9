"""What can go wrong for a user, and the exit code each kind carries."""


class UserError(Exception):
    """Wrong usage, config, data, model or run directory: one line that names the thing, the value and the remedy."""

    exit_code = 2


class Preempted(UserError):
    """The run was asked to stop and saved its state; running the same command again continues it."""

    exit_code = 42


class RunStopped(UserError):
    """The run met something that a restart will not cure, such as a loss that is not finite."""

    exit_code = 43


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise one line that names the thing, its value and the remedy, unless the condition holds."""
    if not condition:
        raise UserError(f"{name}: {value!r} cannot be used: {remedy}")

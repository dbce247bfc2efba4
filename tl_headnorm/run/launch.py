"""What `torchrun` and `accelerate launch` say of this process, in its environment."""

import os

from tl_headnorm.errors import InputError


def number(name: str, default: int) -> int:
    """A whole number a launcher set."""
    try:
        return int(os.environ.get(name) or default)
    except ValueError:
        raise InputError(
            f"{name}: expected a whole number from the launcher, found {os.environ[name]!r}"
        ) from None


def processes() -> int:
    """How many processes a launcher started; 1 without one."""
    return number("WORLD_SIZE", 1) if "RANK" in os.environ else 1

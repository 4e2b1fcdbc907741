"""Files and folders that appear whole or not at all.

Everything is written aside, synchronised to the disk and renamed, so a process may be killed and a machine may lose
power at any moment. Two kinds of leftovers are possible, and their names say what they are worth:

    .tmp-<process>-<name>    unfinished or discarded: always rubbish
    .tmp-old-<name>          the former `<name>`, whole, while a new one takes its place

Needs a POSIX system: folders are synchronised.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def make_folder(path: Path) -> None:
    """Create `path` and its missing parents, each of them durable before anything is put into it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; what is written there becomes `path` in one step.

    On any error, KeyboardInterrupt included, the temporary file goes and `path` stays as it was.
    """
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write one file, bytes or UTF-8 text, in one step: a reader sees the old content or the new, never a part."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; with all that was put into it, it becomes `path`.

    With `replace`, an existing `path` is renamed to `.tmp-old-<name>`, the new one takes its name, and only then the
    old one is deleted. A process that is killed between the two renames leaves the old one whole under that name; the
    next `atomic_folder` or `clean_leftovers` puts it back. Files get the permissions that the umask gives (safetensors
    would keep them from everyone but the owner).

    On any error, KeyboardInterrupt included, the temporary folder goes and `path` is what it was (or, if the error
    came after the last rename, the new one).

    Raises:
        FileExistsError: `path` exists and `replace` is False.
    """
    make_folder(path.parent)
    _finish_swap(path)
    if not replace and os.path.lexists(path):
        raise FileExistsError(f"{path} exists already; remove it or choose another name.")
    temporary = _temporary(path)
    try:
        _remove(temporary)  # a former process may have had the same number: in a container it often does
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        if replace and os.path.lexists(path):
            os.rename(path, _aside(path))
        os.rename(temporary, path)
        sync(path.parent)
    except BaseException:
        _finish_swap(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _finish_swap(path)


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what killed processes left in `folder` and its direct subfolders, and finish interrupted replacements.

    Call it at the start of a run, before this process writes there itself. Returns one sentence for each thing done.
    What a living process is writing stays.
    """
    done = []
    places = [folder, *(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")] if folder.is_dir() else []
    for leftover in sorted(path for place in places for path in place.glob(".tmp-*")):
        if swap := re.fullmatch(r"\.tmp-old-(.+)", leftover.name):
            path = leftover.with_name(swap[1])
            done.append(f"removed the former {path}" if os.path.lexists(path) else f"restored {path}")
            _finish_swap(path)
        elif unfinished := re.fullmatch(r"\.tmp-([0-9]+)-.+", leftover.name):
            pid = int(unfinished[1])
            if pid != os.getpid() and _is_running(pid):
                done.append(f"left {leftover}: process {pid} is running")
            else:
                _remove(leftover)
                done.append(f"removed the unfinished {leftover}")
    return done


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def _aside(path: Path) -> Path:
    return path.with_name(f".tmp-old-{path.name}")


def _finish_swap(path: Path) -> None:
    """End a replacement, maybe an interrupted one: delete the old folder if a new one is there, else restore it."""
    if os.path.lexists(_aside(path)):
        if os.path.lexists(path):
            discard(_aside(path))
        else:
            os.rename(_aside(path), path)
            sync(path.parent)


def discard(path: Path) -> None:
    """Delete a whole folder: it loses its name before its first file, so no half of it is ever taken for the whole."""
    rubbish = _temporary(path)
    _remove(rubbish)
    os.rename(path, rubbish)
    sync(path.parent)
    _remove(rubbish)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    permissions = folder.stat().st_mode & 0o666  # the umask, as the folder got it
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.chmod(os.path.join(root, name), permissions)
            sync(Path(root, name))
        sync(Path(root))


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True

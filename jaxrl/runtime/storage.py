"""Paths that are local, gs:// or s3://: checks, one-line errors, retries, and the few ways in which files are put
there.

Everything goes through fsspec (gcsfs, s3fs), so there is one implementation. What differs: a local file is written
beside its name, flushed and renamed; an object is whole or not there by itself. Passing faults of a store (5xx, 429,
time-outs, lost connections) are tried again with back-off; the clients do that for half a minute, `retry` goes on for
PATIENCE seconds.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib
import logging
import os
import pathlib
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec
from etils import epath

from jaxrl.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
Path = str | os.PathLike

PATIENCE = 120.0  # seconds
CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> package, extra of this project
for _name in ("gs", "gcs", "s3"):  # no cached listings: other processes write here, too
    fsspec.config.conf.setdefault(_name, {}).setdefault("use_listings_cache", False)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the stack of what it then raises


class StoreError(OSError):
    """An object store did not do as asked; one line. passing: whether trying later may help."""

    def __init__(self, text: str, passing: bool):
        super().__init__(text)
        self.passing = passing


def is_remote(path: Path) -> bool:
    """Whether a path is an object store's."""
    return os.fspath(path).startswith(tuple(f"{s}://" for s in CLIENTS))


def as_path(path: Path, key: str) -> epath.Path:
    """The path of a setting; key: its name, for errors.

    Raises UserError for a scheme that does not exist (gss://, gs:/bucket), a missing bucket's name, and a client
    library that is not installed.
    """
    text = os.fspath(path)
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/", text)
    if scheme and not re.match(rf"({'|'.join(CLIENTS)})://[^/]+", text):
        raise UserError(f"{key}={text}: need a local path, gs://bucket/... or s3://bucket/...")
    if scheme:
        package, extra = CLIENTS[scheme[1]]
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise UserError(f"{key}={text}: {scheme[1]}:// needs the package {package} (pip install 'jaxrl[{extra}]')"
                            ) from e
    return epath.Path(text)


def filesystem(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path in it."""
    return fsspec.core.url_to_fs(os.fspath(path))


# ---- faults of a store

_PASSING = ("ClientError", "ServerDisconnected", "Timeout", "ConnectionError", "ConnectionClosed", "ProxyError",
            "Retryable", "EndpointConnection", "ChunkedEncoding", "ChecksumError", "IncompleteRead", "HTTPClientError",
            "TransportError")
_CREDENTIALS = ("CredentialsError", "RefreshError", "NoCredentials", "GoogleAuthError", "TokenRetrieval", "SSOToken")


def explain(error: BaseException) -> tuple[str, bool]:
    """(what is wrong in a few words, whether it may pass) of an exception of fsspec, gcsfs or s3fs."""
    names = [c.__name__ for c in type(error).__mro__ if c.__module__ != "builtins"]
    text = one_line(error)
    code = getattr(error, "code", None) or next(iter(re.findall(r"\((\d{3})\)", text)), None)
    code = int(code) if str(code).isdigit() else 0
    cause = error.__cause__ or error.__context__
    words = f"{text} {one_line(cause) if cause else ''}"
    if isinstance(error, FileNotFoundError):
        # gcsfs names the address that was not there: a bucket's list of objects, or an object.
        missing = re.search(r"\bb/[^/]+/o$|bucket does not exist|NoSuchBucket", str(error))
        return ("no such bucket" if missing else "not found"), False
    busy = code in (408, 429) or code >= 500  # first: the text holds the object's name, too
    if not busy and (code == 401 or any(n in name for n in _CREDENTIALS for name in names) or re.search(
            "ExpiredToken|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|expired|invalid_grant", words)):
        return f"credentials are missing or expired ({text})", False
    if isinstance(error, PermissionError) or code == 403 or "Forbidden" in text:
        return f"no permission ({text})", False
    passing = busy or isinstance(error, ConnectionError | TimeoutError) or any(
        n in name for n in _PASSING for name in names) or bool(re.search(
            "Slow ?Down|Internal ?(Server )?Error|Service ?Unavailable|RequestTimeout|max retries|Too Many", words))
    passing |= isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN)
    return text, passing


def one_line(error: BaseException) -> str:
    """The kind and the text of an exception, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) < 300 else text[:100] + ' ... ' + text[-150:]}"


def retry(what: Path, call: Callable[[], T], patience: float | None = None) -> T:
    """call(), again and again while the fault may pass, for `patience` seconds (PATIENCE), with a warning each time.

    Raises StoreError, one line beginning with `what`; FileNotFoundError and FileExistsError as they are.
    """
    end, delay = time.monotonic() + (PATIENCE if patience is None else patience), 1.0
    while True:
        try:
            return call()
        except FileExistsError:
            raise
        except Exception as e:
            reason, passing = explain(e)
            if isinstance(e, FileNotFoundError) and reason == "not found":
                raise
            if not passing or time.monotonic() + delay > end:
                raise StoreError(f"{os.fspath(what)}: {reason}", passing) from e
            log.warning("%s: %s; trying again", os.fspath(what), reason)
        time.sleep(delay * random.uniform(0.5, 1))
        delay = min(2 * delay, 30.0)


@contextlib.contextmanager
def user_errors(key: str = "") -> Iterator[None]:
    """Turns a store's refusal inside into a UserError that begins with the setting's name, if there is one."""
    try:
        yield
    except (StoreError, FileNotFoundError) as e:
        raise UserError(f"{key}: {e}" if key else str(e)) from e


# ---- files

def fsync_dir(path: Path) -> None:
    """Makes the names inside a local directory survive a power failure; nothing on a store."""
    if is_remote(path):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, whenever the writer dies.

    Raises OSError (disk full, no permission, a store that stays away) with the old file untouched and no temporary
    file left.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        fs, name = filesystem(path)
        retry(path, lambda: fs.pipe_file(name, data))
        return
    path = pathlib.Path(path)
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_chunks(path: Path, chunks: Sequence[bytes | memoryview]) -> list:
    """Writes a new file and flushes it; [bytes, sha256]. Not atomic on a disk: for files that count only once a later
    file (a marker) says so."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    if is_remote(path):
        fs, name = filesystem(path)
        content = b"".join(chunks)
        retry(path, lambda: fs.pipe_file(name, content))
    else:
        with open(path, "wb") as f:
            f.writelines(chunks)
            f.flush()
            os.fsync(f.fileno())
    return [sum(len(c) for c in chunks), digest.hexdigest()]


def create(path: Path, data: bytes) -> bool:
    """Writes an object if there is none of this name (a conditional write); False if there is."""
    fs, name = filesystem(path)
    try:
        retry(path, lambda: fs.pipe_file(name, data, mode="create"))
    except FileExistsError:
        # It may be our own: written by a first try whose answer got lost.
        return retry(path, lambda: fs.cat_file(name)) == data
    return True


def read(path: Path, start: int | None = None, stop: int | None = None) -> bytes:
    """The content of a file, or its bytes from start to stop. Raises FileNotFoundError, StoreError, OSError."""
    if not is_remote(path) and start is None:
        return pathlib.Path(path).read_bytes()
    fs, name = filesystem(path)
    return retry(path, lambda: fs.cat_file(name, start=start, end=stop)) if is_remote(path) else fs.cat_file(
        name, start=start, end=stop)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    if is_remote(path):
        return hashlib.sha256(read(path)).hexdigest()
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def files_below(root: Path) -> dict[str, int]:
    """{relative name with "/": bytes} of all files below a directory; {} if it is not there."""
    fs, name = filesystem(root)
    found = retry(root, lambda: fs.find(name, detail=True)) if is_remote(root) else fs.find(name, detail=True)
    prefix = name.rstrip("/") + "/"
    return {n.removeprefix(prefix): int(i["size"]) for n, i in sorted(found.items()) if n.startswith(prefix)}


def fingerprint(root: Path, ending: str) -> str:
    """16 hexadecimal digits over name, size and the store's own digest of the files below a remote directory."""
    fs, name = filesystem(root)
    found = retry(root, lambda: fs.find(name, detail=True))
    told = [(n.removeprefix(name), i["size"], next((i[k] for k in ("md5Hash", "crc32c", "ETag", "etag") if k in i), ""))
            for n, i in sorted(found.items()) if n.endswith(ending)]  # fmt: skip
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def children(root: Path) -> list[str]:
    """Sorted names of what lies directly in a directory; [] if it is not there."""
    fs, name = filesystem(root)
    try:
        found = retry(root, lambda: fs.ls(name, detail=False)) if is_remote(root) else os.listdir(name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted({n.rstrip("/").rsplit("/", 1)[-1] for n in found if n.rstrip("/") != name.rstrip("/")})


def remove_file(path: Path) -> None:
    """Deletes a file; nothing if it is not there. Raises OSError."""
    fs, name = filesystem(path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        retry(path, lambda: fs.rm_file(name)) if is_remote(path) else os.remove(name)


def remove(path: Path) -> None:
    """Deletes a directory with all below it; nothing if it is not there. Raises OSError."""
    if is_remote(path):
        in_threads([functools.partial(remove_file, epath.Path(path) / n) for n in files_below(path)], 8)
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def exists(path: Path) -> bool:
    """Whether there is a file or a directory of this name."""
    fs, name = filesystem(path)
    return retry(path, lambda: fs.exists(name)) if is_remote(path) else os.path.exists(name)


def in_threads(calls: Iterable[Callable[[], T]], threads: int = 4) -> list[T]:
    """The results of calls, in their order. Raises what the first failing one raised.

    Plain threads and not an executor: executors refuse work while the interpreter shuts down, which is when the last
    save of a run may still be under way.
    """
    todo = list(enumerate(calls))[::-1]
    out, errors = [None] * len(todo), []

    def work():
        while todo and not errors:
            try:
                i, call = todo.pop()
                out[i] = call()
            except IndexError:
                return
            except Exception as e:
                errors.append(e)

    workers = [threading.Thread(target=work) for _ in range(min(threads, len(todo)))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    if errors:
        raise errors[0]
    return out


# ---- local copies

def scratch(path: Path, kind: str) -> pathlib.Path:
    """Where copies of a remote directory or file lie on this machine: no such place lies in another one's."""
    url = os.fspath(epath.Path(path))
    name = re.sub(r"[^\w.=+-]", "_", url.rpartition("/")[2]).lstrip(".") or "root"
    base = pathlib.Path(tempfile.gettempdir(), f"jaxrl-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    return base / kind / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def output(root: Path, key: str, folder: str = "") -> Mirror:
    """The directory of a command's results, to be closed when all of them are there. folder: of the files that the
    command goes on with; the others are neither read nor touched.

    Raises UserError naming the setting `key`.
    """
    root = as_path(root, key)
    with user_errors(key):
        names = files_below(root / folder) if folder and is_remote(root) else ()
        return Mirror(root, [f"{folder}/{name}" for name in names], f"results-{os.getpid()}")


@functools.lru_cache(maxsize=64)
def local_copy(path: str, key: str, choose: Callable[[list[str]], list[str]] = list) -> pathlib.Path:
    """A local path with the content of `path`: itself, or a copy made now (once a process).

    choose: from the relative names of all files to those that are copied. Raises UserError naming `key` if `path`
    cannot be read, or is an object store's and not there.
    """
    if not is_remote(path := os.fspath(as_path(path, key))):
        return pathlib.Path(path)
    target = scratch(path, "copies")
    with user_errors(key):
        fs, name = filesystem(path)
        below = list(files_below(path))
        if not below and not exists(path):
            raise FileNotFoundError(f"{path}: not found")
        names = choose(below)
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = {f"{name}/{n}": target / n for n in names} if below else {name: target}
        for old in [p for p in target.rglob("*") if p.is_file()]:  # copied earlier and deleted in the store since
            if not old.name.startswith(".") and old.relative_to(target).as_posix() not in below:
                old.unlink(missing_ok=True)
        in_threads([functools.partial(_download, fs, *pair) for pair in whole.items()], 8)
    return target


def _download(fs: Any, name: str, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    retry(name, lambda: fs.get_file(name, str(part)))
    os.replace(part, target)


class Mirror:
    """A local directory that stands for `root`: `local` is root itself, or for a store a folder whose files `push`
    uploads.

    Files can thus be appended to, renamed and flushed as on any disk, and are uploaded when it matters. pull: names
    that are copied from the store first. kind: of folder; a machine has one folder of each kind and root at a time.
    """

    def __init__(self, root: Path, pull: Sequence[str] = (), kind: str = "runs"):
        self.root, self.local = root, pathlib.Path(root)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        if is_remote(root):
            self.local = scratch(root, kind)
            remove(self.local)
            self.local.mkdir(parents=True)
            for name in pull:
                with contextlib.suppress(FileNotFoundError):
                    content = read(epath.Path(root) / name)
                    (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.local / name).write_bytes(content)
                    self._pushed[name] = self._stamp(self.local / name)

    def push(self) -> None:
        """Uploads what has changed since the last time. Raises StoreError."""
        if not is_remote(self.root):
            return
        with self._lock:
            changed = {}
            for path in self.local.rglob("*"):
                name = path.relative_to(self.local).as_posix()
                hidden = any(part.startswith(".") or part == "wandb" for part in name.split("/"))
                if path.is_file() and not hidden and self._pushed.get(name) != self._stamp(path):
                    changed[name] = self._stamp(path)
            in_threads([functools.partial(self._upload, name) for name in changed])
            self._pushed |= changed

    @staticmethod
    def _stamp(path: pathlib.Path) -> tuple[int, int]:
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_size

    def _upload(self, name: str) -> None:
        atomic_write(epath.Path(self.root) / name, (self.local / name).read_bytes())

    def forget(self, names: Iterable[str]) -> None:
        """Deletes files in `local` and in the store."""
        for name in names:
            (self.local / name).unlink(missing_ok=True)
            if is_remote(self.root):
                self._pushed.pop(name, None)
                remove_file(epath.Path(self.root) / name)

    def close(self) -> None:
        """The last push; the local folder of a store's directory is removed. Raises StoreError."""
        self.push()
        if is_remote(self.root):
            remove(self.local)

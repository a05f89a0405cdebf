"""LibriSpeech's archives: what is published, and a part from ``PART.tar.gz`` to a folder.

A part is unpacked beside its place and moved there at the end, so a folder that is there is whole.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tqdm import tqdm

from reproduce.data.corpora.download import download, file_sha256, partial, remote_size
from reproduce.data.disk import require_space
from reproduce.errors import DataError

URL = "https://www.openslr.org/resources/12"


@dataclass(frozen=True)
class Published:
    """A part as published: bytes and SHA-256 of its archive, utterances, hours of speech."""

    bytes: int
    sha256: str
    utterances: int
    hours: float


# SHA-256: torchaudio.datasets.librispeech; bytes: Kaldi's local/download_and_untar.sh; hours:
# Panayotov et al. 2015, table 1.
PUBLISHED = {
    "train-clean-100": Published(
        6387309499,
        "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2", 28539, 100.6,
    ),
    "train-clean-360": Published(
        23049477885,
        "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf", 104014, 363.6,
    ),
    "train-other-500": Published(
        30593501606,
        "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2", 148688, 496.7,
    ),
    "dev-clean": Published(
        337926286,
        "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3", 2703, 5.4,
    ),
    "dev-other": Published(
        314305928,
        "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365", 2864, 5.3,
    ),
    "test-clean": Published(
        346663984,
        "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23", 2620, 5.4,
    ),
    "test-other": Published(
        328757843,
        "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29", 2939, 5.1,
    ),
}  # fmt: skip
"""LibriSpeech's parts."""

UNPACKED = 1.05
"""Bytes of the unpacked tree over those of its archive: FLAC doesn't shrink."""


DOWNLOADS = ".downloads"
"""Folder in the root of what was downloaded, to be deleted when it is unpacked."""


@dataclass(frozen=True)
class Job:
    """A part to be unpacked; `fetch` where its archive is still to be downloaded."""

    part: str
    archive: Path
    bytes: int
    fetch: str | None

    @property
    def to_fetch(self) -> int:
        if self.fetch is None:
            return 0
        part = partial(self.archive)
        return max(0, self.bytes - (part.stat().st_size if part.exists() else 0))


def obtain(
    missing: Callable[[], tuple[Path, list[str]]],
    folder: Path,
    *,
    url: str | None,
    sha256: Mapping[str, str],
) -> bool:
    """Unpack the missing parts' archives, one after the other; what was downloaded is deleted then.

    Args:
        missing: where the parts belong, and which are missing; asked again once no other process
            is at it.
        folder: where the archives are, or are downloaded to.
        url: where archives are downloaded from; None: only those that are there.
        sha256: by part; archives of other parts that are there are unpacked unchecked.

    Returns:
        whether there was anything to do; never only a part of it.

    Raises:
        DataError: an archive can't be fetched or isn't what it should be, or there is no room.
    """
    base, parts = missing()
    if not parts or (url is None and not all(_archive(part, folder, base) for part in parts)):
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            base, parts = missing()
            for part in parts:
                shutil.rmtree(_aside(base, part), ignore_errors=True)  # of a killed process
            jobs = [_job(part, folder, base, url, sha256) for part in parts]
            needed = sum(round(job.bytes * UNPACKED) for job in jobs)
            needed += max((job.to_fetch for job in jobs), default=0)
            require_space(folder, needed, f"unpacking {', '.join(parts)}")
            for job in jobs:
                _do(job, base, sha256.get(job.part))
            downloads = folder / DOWNLOADS
            if downloads.is_dir() and not any(downloads.iterdir()):
                downloads.rmdir()
    except OSError as error:
        raise DataError(
            f"can't be written: {error.strerror or error}",
            where=str(error.filename or folder),
            do="make room, or choose a folder that can be written for data.root (links to the "
            "archives will do there)",
        ) from None
    return True


def _archive(part: str, folder: Path, base: Path) -> Path | None:
    """The archive of a part in the root, beside the parts, or downloaded before."""
    places = (f / f"{part}.tar.gz" for f in (folder, base, folder / DOWNLOADS))
    return next((path for path in places if path.is_file()), None)


def _job(part: str, folder: Path, base: Path, url: str | None, sha256: Mapping[str, str]) -> Job:
    archive = _archive(part, folder, base)
    if archive is not None:
        return Job(part, archive, archive.stat().st_size, None)
    if url is None:
        raise DataError(
            f"{part}.tar.gz is gone",
            where=str(folder),
            do="put it back, or fetch it with --set data.download=true",
        )
    if part not in sha256:
        known = ", ".join(sha256)
        raise DataError(
            f"no SHA-256 is known for part {part}; known: {known}",
            where="data.archives_sha256",
            do="give it there, or name a part of LibriSpeech",
        )
    address = f"{url.rstrip('/')}/{part}.tar.gz"
    size = remote_size(address) or (PUBLISHED[part].bytes if part in PUBLISHED else 0)
    return Job(part, folder / DOWNLOADS / f"{part}.tar.gz", size, address)


def _do(job: Job, base: Path, sha256: str | None) -> None:
    if job.fetch is not None:
        assert sha256 is not None
        job.archive.parent.mkdir(exist_ok=True)
        download(job.fetch, job.archive, sha256)
    elif sha256 is not None:
        found = file_sha256(job.archive, f"checking {job.archive.name}")
        if found != sha256:
            raise DataError(
                f"SHA-256 is {found}, expected {sha256}",
                where=str(job.archive),
                do="it is damaged, or not the published archive: fetch it anew, or give its "
                "SHA-256 in data.archives_sha256",
            )
    extract(job.archive, job.part, base)
    if job.archive.parent.name == DOWNLOADS:
        job.archive.unlink()


def extract(archive: Path, part: str, base: Path) -> None:
    """Unpack the folder `part` of a .tar.gz, as ``PART/...`` or ``LibriSpeech/PART/...``, to
    ``base/PART``; the texts beside it (licence, speakers) too.

    Raises:
        DataError: damaged, without that folder, or with a member that is a link or a device or
            would leave the folder.
    """
    aside = _aside(base, part)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with open(archive, "rb") as raw, _bar(raw, f"unpacking {archive.name}") as file:
            _extract(file, part, aside)
        folder = next((f for f in (aside / "LibriSpeech" / part, aside / part) if f.is_dir()), None)
        if folder is None:
            raise DataError(
                f"holds no folder {part}",
                where=str(archive),
                do="it isn't that part: fetch it anew",
            )
        for text in folder.parent.iterdir():
            if text.is_file() and not (base / text.name).exists():
                os.replace(text, base / text.name)
        os.replace(folder, base / part)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"can't be unpacked: {error or type(error).__name__}",
            where=str(archive),
            do="fetch it anew",
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(base: Path, part: str) -> Path:
    """Where a part is unpacked, before it is moved to its place."""
    return base / f".unpacking-{part}"


def _extract(file: IO[bytes], part: str, aside: Path) -> None:
    with gzip.open(file) as plain:
        with tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
                if not (member.isreg() or member.isdir()):
                    raise tarfile.TarError(f"{member.name!r} is neither a file nor a folder")
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise tarfile.TarError(f"{member.name!r} would leave the folder")
                names = [name for name in path.parts if name != "."]
                inner = names[1:] if names[:1] == ["LibriSpeech"] else names
                text = len(inner) == 1 and member.isreg() and inner[0].lower().endswith(".txt")
                if inner[:1] == [part] or text:
                    _write(tar, member, aside.joinpath(*names))
        while plain.read(1 << 20):  # to the end, where the checksum is
            pass


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """A file or folder with this process's rights; ``TarFile.extract`` is safe from 3.11.4 on."""
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None
    with source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)


@contextmanager
def _bar(raw: IO[bytes], what: str) -> Iterator[IO[bytes]]:
    total = os.fstat(raw.fileno()).st_size
    with tqdm.wrapattr(raw, "read", total, desc=what, disable=None) as file:
        yield cast(IO[bytes], file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    with open(folder / ".w2vrep.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

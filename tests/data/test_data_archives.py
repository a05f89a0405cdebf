"""LibriSpeech from archives and over HTTP: whole, resumed, refused."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_corpora import Server, make_part, member, pack_tree, serving

from reproduce.data import disk
from reproduce.data.corpora import Utterance, archives, provide_corpus, read_corpus
from reproduce.data.corpora import download as module
from reproduce.data.corpora.archives import PUBLISHED, extract
from reproduce.data.corpora.download import download, partial
from reproduce.errors import DataError, MissingCorpusError

PARTS = {"train-clean-100": {20: {0: "ONE", 1: "TWO"}}, "dev-clean": {30: {0: "THREE"}}}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))


@pytest.fixture
def packed(tmp_path: Path) -> dict[str, bytes]:
    """Archives of both parts, by file name."""
    made = {}
    for part, speakers in PARTS.items():
        make_part(tmp_path / "source", part, speakers)
        name = f"{part}.tar.gz"
        made[name] = pack_tree(tmp_path / name, tmp_path / "source", part)
    return made


@pytest.fixture
def server(packed: dict[str, bytes]) -> Iterator[Server]:
    with serving(packed) as running:
        yield running


def sha256s(packed: dict[str, bytes]) -> dict[str, str]:
    return {name[:-7]: hashlib.sha256(data).hexdigest() for name, data in packed.items()}


def texts(root: Path) -> list[str]:
    items = list(read_corpus("librispeech", root=root))
    assert all(isinstance(item, Utterance) for item in items)
    assert all(len(item.audio.load().samples) == 1600 for item in items)
    return [item.text for item in items]


def test_the_list_is_that_of_torchaudio() -> None:
    from reproduce.compat import import_torchaudio

    theirs = import_torchaudio("torchaudio.datasets.librispeech")._CHECKSUMS
    ours = {f"/{part}.tar.gz": published.sha256 for part, published in PUBLISHED.items()}
    assert {url[url.rindex("/") :]: sha256 for url, sha256 in theirs.items()} == ours


# --------------------------------------------------------------------------------------- download

DATA = np.random.default_rng(0).bytes(5_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def remote() -> Iterator[Server]:
    with serving({"file.bin": DATA}) as running:
        yield running


def fetch(remote: Server, folder: Path, sha256: str = SHA256) -> Path:
    target = folder / "file.bin"
    download(f"{remote.url}/file.bin", target, sha256)
    assert target.read_bytes() == DATA
    assert not partial(target).exists()
    return target


def test_a_download_goes_on_where_the_connection_was_cut(remote: Server, tmp_path: Path) -> None:
    remote.cut_after = [1_000_000, 0, 2_500_000]
    fetch(remote, tmp_path)
    assert remote.asked == ["whole", "bytes=1000000-", "bytes=1000000-", "bytes=3500000-"]


def test_a_download_goes_on_in_another_call(remote: Server, tmp_path: Path) -> None:
    remote.cut_after = [2_000_000, 0, 0]
    with pytest.raises(DataError, match="2000000 of 5000000 bytes arrived\n  run the same command"):
        fetch(remote, tmp_path)
    assert partial(tmp_path / "file.bin").stat().st_size == 2_000_000
    remote.asked.clear()
    fetch(remote, tmp_path)
    assert remote.asked == ["bytes=2000000-"]


def test_a_server_without_ranges_sends_it_all_again(remote: Server, tmp_path: Path) -> None:
    remote.ranges, remote.cut_after = False, [2_000_000]
    fetch(remote, tmp_path)
    assert remote.asked == ["whole", "bytes=2000000-"]


@pytest.mark.parametrize(("there", "asks"), [(DATA, 1), (DATA + b"more", 2)])
def test_what_is_whole_already_or_too_long(
    remote: Server, tmp_path: Path, there: bytes, asks: int
) -> None:
    partial(tmp_path / "file.bin").write_bytes(there)
    fetch(remote, tmp_path)
    assert len(remote.asked) == asks


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(
    remote: Server, tmp_path: Path
) -> None:
    remote.statuses = [503, 429]
    fetch(remote, tmp_path)
    remote.asked.clear()
    with pytest.raises(DataError, match="HTTP 404"):
        download(f"{remote.url}/other.bin", tmp_path / "other.bin", SHA256)
    assert len(remote.asked) == 1
    with pytest.raises(DataError, match="can't be fetched"):
        download("http://127.0.0.1:9/file.bin", tmp_path / "other.bin", SHA256)


def test_a_wrong_checksum_keeps_nothing(remote: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"SHA-256 is {SHA256}, expected 0000"):
        fetch(remote, tmp_path, "0" * 64)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ parts


def test_archives_in_the_root_are_unpacked_once(tmp_path: Path, packed: dict[str, bytes]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, data in packed.items():
        (root / name).write_bytes(data)
    with pytest.raises(MissingCorpusError, match="no part train-clean-100, dev-clean"):
        texts(root)
    options = {"root": root, "archives_sha256": sha256s(packed)}
    assert provide_corpus("librispeech", **options)
    assert texts(root) == ["ONE", "TWO", "THREE"]
    assert (root / "LibriSpeech" / "LICENSE.TXT").read_bytes() == b"CC BY"
    assert {path.name for path in root.iterdir()} == {*packed, "LibriSpeech", ".w2vrep.lock"}
    assert not provide_corpus("librispeech", **options)


def test_an_archive_that_is_not_the_published_one_is_refused(
    tmp_path: Path, packed: dict[str, bytes]
) -> None:
    (tmp_path / "root").mkdir()
    for name, data in packed.items():
        (tmp_path / "root" / name).write_bytes(data)
    with pytest.raises(DataError, match="expected d4ddd1d5"):
        provide_corpus("librispeech", root=tmp_path / "root")
    assert not (tmp_path / "root" / "LibriSpeech" / "train-clean-100").exists()


def test_parts_are_downloaded_unpacked_and_the_archives_deleted(
    tmp_path: Path, packed: dict[str, bytes], server: Server
) -> None:
    root = tmp_path / "new" / "root"
    options = {"root": root, "download_url": server.url, "archives_sha256": sha256s(packed)}
    assert not provide_corpus("librispeech", **options), "nobody asked for a download"
    server.cut_after = [1000, 0, 0]
    with pytest.raises(DataError, match="1000 of"):
        provide_corpus("librispeech", download=True, **options)
    assert provide_corpus("librispeech", download=True, **options)
    assert "bytes=1000-" in server.asked
    assert texts(root) == ["ONE", "TWO", "THREE"]
    assert {path.name for path in root.iterdir()} == {"LibriSpeech", ".w2vrep.lock"}
    with pytest.raises(DataError, match="no SHA-256 is known for part mine; known: train-clean"):
        provide_corpus("librispeech", download=True, **options, train_parts=["mine"])


def test_room_is_looked_for_before_anything_is_fetched(
    tmp_path: Path, packed: dict[str, bytes], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3000)
    with pytest.raises(DataError, match=r"unpacking train-clean-100, dev-clean takes 1\d\.\d KiB"):
        provide_corpus(
            "librispeech", root=tmp_path / "root", download=True, download_url=server.url,
            archives_sha256=sha256s(packed),
        )  # fmt: skip
    assert server.asked == []


def test_what_a_killed_process_unpacked_takes_no_room(
    tmp_path: Path, packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed before room is looked for."""
    root = tmp_path / "root"
    left = root / "LibriSpeech" / ".unpacking-dev-clean"
    left.mkdir(parents=True)
    (left / "much").write_bytes(bytes(10_000_000))
    for name, data in packed.items():
        (root / name).write_bytes(data)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0 if left.exists() else 1 << 20)
    assert provide_corpus("librispeech", root=root, archives_sha256=sha256s(packed))
    assert texts(root) == ["ONE", "TWO", "THREE"]


def test_two_at_once_unpack_once(
    tmp_path: Path, packed: dict[str, bytes], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits, and then finds nothing missing: not the deleted archive either."""
    options = {
        "root": tmp_path / "root", "download": True, "download_url": server.url,
        "archives_sha256": sha256s(packed),
    }  # fmt: skip
    begun, unpacked = threading.Event(), []

    def slowly(archive: Path, part: str, base: Path) -> None:
        begun.set()
        time.sleep(0.3)
        unpacked.append(part)
        extract(archive, part, base)

    monkeypatch.setattr(archives, "extract", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(provide_corpus, "librispeech", **options)
        assert begun.wait(10)
        second = pool.submit(provide_corpus, "librispeech", **options)
        assert first.result()
        assert second.result()
    assert unpacked == ["train-clean-100", "dev-clean"]
    assert server.asked == ["whole", "whole"]
    assert texts(tmp_path / "root") == ["ONE", "TWO", "THREE"]


def test_a_folder_without_parts_is_not_preferred(tmp_path: Path, packed: dict[str, bytes]) -> None:
    """Such as a refused archive, or a user, leaves."""
    make_part(tmp_path / "root", "train-clean-100", PARTS["train-clean-100"])
    archive = tmp_path / "root" / "dev-clean.tar.gz"
    options = {"root": tmp_path / "root", "archives_sha256": {}}
    (tmp_path / "root" / "LibriSpeech").mkdir()
    archive.write_bytes(b"damaged")
    with pytest.raises(DataError, match="expected 76f87d09"):
        provide_corpus("librispeech", **options)
    archive.write_bytes(packed["dev-clean.tar.gz"])
    options["archives_sha256"] = sha256s(packed)
    assert provide_corpus("librispeech", **options)
    assert texts(tmp_path / "root") == ["ONE", "TWO", "THREE"]
    assert not list((tmp_path / "root" / "LibriSpeech").iterdir())


# ------------------------------------------------------------------------------------ unpacking


@pytest.mark.parametrize(
    "bad",
    [
        member("LibriSpeech/dev-clean/../../../outside.txt", b"x"),
        member("../outside.txt", b"x"),
        member("/outside.txt", b"x"),
        member("LibriSpeech/dev-clean/l", type=tarfile.SYMTYPE, linkname="/etc"),
        member("LibriSpeech/dev-clean/l", type=tarfile.LNKTYPE, linkname="../../outside.txt"),
        member("LibriSpeech/dev-clean/fifo", type=tarfile.FIFOTYPE),
        member("LibriSpeech/dev-clean/dev", type=tarfile.CHRTYPE),
    ],
    ids=["inner ..", "outer ..", "absolute", "symbolic link", "hard link", "pipe", "device"],
)
def test_nothing_leaves_its_folder(tmp_path: Path, bad: tuple) -> None:
    base = tmp_path / "a" / "base"
    base.mkdir(parents=True)
    archive = tmp_path / "dev-clean.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(*member("LibriSpeech/dev-clean/1/1/1.trans.txt", b"good"))
        tar.addfile(*bad)
    with pytest.raises(DataError, match="can't be unpacked"):
        extract(archive, "dev-clean", base)
    assert list(base.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a", archive.name}


def test_damaged_archives_are_one_clear_error(tmp_path: Path, packed: dict[str, bytes]) -> None:
    data = packed["dev-clean.tar.gz"]
    plain = gzip.decompress(data)
    wrong = bytearray(data)
    wrong[-6] ^= 1  # the checksum
    for content in (
        b"", b"not an archive", data[:-4], data[: len(data) // 2], bytes(wrong),
        gzip.compress(plain[: 512 * 7]), gzip.compress(b"hello " * 1000),
    ):  # fmt: skip
        (tmp_path / "x.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"can't be unpacked|holds no folder dev-clean"):
            extract(tmp_path / "x.tar.gz", "dev-clean", tmp_path)
        assert not (tmp_path / "dev-clean").exists()
    (tmp_path / "x.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="holds no folder test-clean"):
        extract(tmp_path / "x.tar.gz", "test-clean", tmp_path)


def test_a_part_half_unpacked_is_begun_anew(
    tmp_path: Path, packed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tar.gz").write_bytes(packed["dev-clean.tar.gz"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "x.tar.gz", "dev-clean", tmp_path)
    assert not (tmp_path / "dev-clean").exists()
    assert not list(tmp_path.glob(".unpacking*")), "it cleans up after itself"
    extract(tmp_path / "x.tar.gz", "dev-clean", tmp_path)
    assert (tmp_path / "dev-clean" / "30" / "1" / "30-1-0000.flac").is_file()
    assert not list(tmp_path.glob(".unpacking*"))

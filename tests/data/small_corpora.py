"""Small corpora on disk, and a web server that fails as told."""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from reproduce.data.audio import Decoded
from reproduce.data.corpora import AudioSource, Utterance
from reproduce.data.manifest import write_manifest

Texts = Mapping[int, str]


def noise(seconds: float = 0.1, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """float32 [T]."""
    samples = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return samples.astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16000, form: str = "FLAC", sub: str = "PCM_16"):
    """An audio file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=sub)
    return file.getvalue()


@dataclass(frozen=True)
class Sound(AudioSource):
    """Noise; with a log it takes its time, and writes down who made it."""

    seed: int
    log: str = ""

    def load(self) -> Decoded:
        if self.log:
            time.sleep(0.02)
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {self.seed}\n")
        return Decoded(noise(0.1, self.seed), 16000, str(self.seed))


def sounds(log: str = "") -> list[Utterance]:
    return [Utterance(f"u{n}", "train", "", "TEXT", f"{n}", Sound(n, log)) for n in range(120)]


def write_in_two(items: list[Utterance], folder: Path) -> None:
    """Prepare with two processes."""
    write_manifest(items, folder, corpus="noise", jobs=2)


def make_part(base: Path, part: str, speakers: Mapping[int, Texts], seconds: float = 0.1) -> None:
    """A part in LibriSpeech's layout: speaker -> number -> text, noise for sound."""
    for speaker, texts in speakers.items():
        folder = base / part / str(speaker) / "1"
        folder.mkdir(parents=True)
        lines = [f"{speaker}-1-{number:04} {text}\n" for number, text in texts.items()]
        (folder / f"{speaker}-1.trans.txt").write_text("".join(lines), encoding="utf-8")
        for number in texts:
            data = encoded(noise(seconds, speaker * 1000 + number))
            (folder / f"{speaker}-1-{number:04}.flac").write_bytes(data)


def pack_tree(archive: Path, base: Path, part: str) -> bytes:
    """``base/PART`` as a .tar.gz in LibriSpeech's layout, with a licence beside it; its bytes."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(*member("LibriSpeech/LICENSE.TXT", b"CC BY"))
        tar.add(base / part, f"LibriSpeech/{part}")
    return archive.read_bytes()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A member of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


@dataclass
class Server:
    """What it serves, what it was asked for, and how it fails."""

    files: dict[str, bytes]
    url: str = ""
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connection is cut, an answer each, until the list is empty."""
    statuses: list[int] = field(default_factory=list)
    """Answers with these first."""
    asked: list[str] = field(default_factory=list)
    """GET requests: the Range header, or ``whole``."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A local web server."""
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            server.asked.append(self.headers.get("Range", "whole"))
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            data = server.files.get(self.path.lstrip("/"))
            if server.statuses and not head:
                return self.send_error(server.statuses.pop(0))
            if data is None:
                return self.send_error(404)
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match and server.ranges else 0
            if start and start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not head:
                end = start + server.cut_after.pop(0) if server.cut_after else len(data)
                self.wfile.write(data[start:end])

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{web.server_address[1]}"
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        web.shutdown()
        thread.join()
        web.server_close()

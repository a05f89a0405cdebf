"""transcribe: speech in files to text, by a finished recognizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from reproduce.data.audio import SAMPLE_RATE, AudioError, Decoded, decode, pack
from reproduce.model import load_recognizer
from reproduce.training.distributed import joined


@dataclass(frozen=True)
class Transcript:
    """A file's text, or the reason why it has none.

    Attributes:
        file: as it was named.
        seconds: its length at 16 kHz; None if it can't be read.
    """

    file: str
    seconds: float | None = None
    text: str | None = None
    error: str | None = None

    def as_json(self) -> str:
        """One line; what isn't there is left out."""
        there = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(there, ensure_ascii=False).encode(errors="backslashreplace").decode()


def transcribe(model: Path, files: Iterable[Path], device: str = "auto") -> Iterator[Transcript]:
    """The transcripts of audio files in their order, each read as training reads it.

    Audio is decoded, mixed down and resampled as by ``prepare``; long files are read in windows.

    Raises:
        DataError: no recognizer in the folder, or no characters beside it.
        UsageError: no such device.
    """
    with joined(device) as ranks:
        recognizer = load_recognizer(model).to(ranks.device)
    recognizer.decoder  # noqa: B018  a folder without characters is known before any file
    for file in files:
        try:
            samples = pack(Decoded(*decode(file.read_bytes()), sha256="")).samples
        except (AudioError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            yield Transcript(str(file), error=reason or type(error).__name__)
            continue
        seconds = round(len(samples) / SAMPLE_RATE, 3)
        yield Transcript(str(file), seconds, recognizer.transcribe(samples))

"""``summary.json``: what a prepared corpus holds, what was left out, and what to be wary of."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from reproduce.data.audio import SAMPLE_RATE
from reproduce.data.corpora import SPLITS, Rejected
from reproduce.data.corpora.archives import PUBLISHED
from reproduce.data.packing import DUPLICATE, Entry
from reproduce.data.subsets import list_name
from reproduce.errors import DataError
from reproduce.records import write_text

NAMED = 20
"""At most so many speakers or ids are named in one warning."""
LONG = 60
"""s: fine-tuning reads utterances whole, and longer ones than this are likely to be uncut."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``.

    Attributes:
        corpus: its name.
        options: what it was read with.
        subset_seed: of the permutation that makes the nested subsets.
        listing_sha256: hash of what the corpus listed: ids, texts, paths, file sizes and times.
        manifest_sha256: hash of ``manifest.csv``, byte for byte: the utterance list.
        samples: packed, in all files.
        utterances, hours, speakers: by split; speakers by name.
        lengths: by split: ``shortest``, ``median``, ``longest`` utterance in seconds.
        subsets: by nested training subset: ``utterances``, ``hours``, and ``sha256`` of its list
            (`reproduce.data.subsets.SubsetLists`).
        conversions: how many utterances were ``resampled``, ``mixed_down``, ``clipped`` (amplitudes
            outside -1..1).
        rejected: ``source``, ``id``, ``reason`` and ``split`` (empty where it isn't known) of
            everything that was left out.
        warnings: sentences.
        audio: ``file``, ``samples`` and ``sha256`` of each file of packed audio, in order.
        columns_sha256: hash of ``manifest.arrow``; empty where a version before it prepared.
        outcome: what the call that returned this did: ``made``, ``made anew`` (other data was there
            before) or ``there already``; not stored.
    """

    corpus: str
    options: dict[str, Any]
    subset_seed: int
    listing_sha256: str
    manifest_sha256: str
    samples: int
    utterances: dict[str, int]
    hours: dict[str, float]
    speakers: dict[str, list[str]]
    lengths: dict[str, dict[str, float]]
    subsets: dict[str, dict[str, Any]]
    conversions: dict[str, int]
    rejected: list[dict[str, str | None]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    audio: list[dict[str, Any]] = field(default_factory=list)
    columns_sha256: str = ""
    outcome: str = field(default="there already", compare=False)

    def reasons(self) -> dict[str, int]:
        """Reasons for rejection, without their details, most frequent first."""
        counts = Counter(str(item["reason"]).partition(":")[0] for item in self.rejected)
        return dict(counts.most_common())

    def write(self, path: Path) -> None:
        """Write whole or not at all."""
        stored = {name: value for name, value in asdict(self).items() if name != "outcome"}
        text = json.dumps(stored, indent=1, ensure_ascii=False, default=str)
        write_text(path, text + "\n")

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read ``summary.json``; keys of later versions are ignored, and earlier ones, which had
        one file of audio, understood.

        Raises:
            DataError: missing, or not a summary.
        """
        do = f"run `w2vrep prepare RECIPE --work {path.parent.parent}`"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if "audio" not in raw:
                one = {"file": "audio.pcm", "samples": raw["samples"]}
                raw["audio"] = [{**one, "sha256": raw["audio_sha256"]}]
            known = cls.__dataclass_fields__.keys() - {"outcome"}
            return cls(**{k: v for k, v in raw.items() if k in known})
        except FileNotFoundError:
            raise DataError("nothing is prepared here", where=str(path), do=do) from None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError(f"not a summary: {error}", where=str(path), do=do) from None

    def require_subset(self, subset: str, sha256: str | None) -> None:
        """Check that a training subset is the one that a recipe asks for.

        Raises:
            DataError: its list has another hash.
        """
        found = self.subsets[subset]["sha256"]
        if sha256 is not None and found != sha256:
            raise DataError(
                f"data.subset_sha256 asks for {sha256}, subset {subset} of this corpus has {found}",
                where=list_name(subset),
                do="it has other utterances, or in another order: compare that file with the list "
                "the hash was taken of, or leave data.subset_sha256 out",
            )


class Tally:
    """Gathers a `Summary`, an entry at a time."""

    def __init__(self) -> None:
        self._seconds = {split: array("d") for split in SPLITS}
        self._speakers: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._folders: Counter[str] = Counter()
        self._conversions = Counter({"resampled": 0, "mixed_down": 0, "clipped": 0})
        self._clipped: list[str] = []
        self._long: list[str] = []
        self._characters: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._users: dict[tuple[str, str], list[str]] = {}
        self._rejected: list[dict[str, str | None]] = []
        self._ids: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Count a row of the manifest."""
        split = entry.split
        self._ids.add(entry.id)
        self._folders[entry.source.partition("/")[0]] += 1
        self._seconds[split].append(entry.samples / SAMPLE_RATE)
        if entry.speaker:
            self._speakers[split].add(entry.speaker)
        self._conversions["resampled"] += entry.rate != SAMPLE_RATE
        self._conversions["mixed_down"] += entry.channels > 1
        self._conversions["clipped"] += entry.clipped > 0
        if entry.clipped > 0.01 * entry.samples:
            self._clipped.append(entry.id)
        if entry.samples > LONG * SAMPLE_RATE:
            self._long.append(entry.id)
        new = set(entry.text) - self._characters["train"] - {" "}
        self._characters[split] |= new
        if split != "train":
            for character in new:
                users = self._users.setdefault((split, character), [])
                if len(users) < NAMED:
                    users.append(entry.id)

    def reject(self, item: Rejected) -> None:
        """Count something left out."""
        if item.id is not None:
            self._folders[item.source.partition("/")[0]] += 1
        self._rejected.append(asdict(item))

    def summary(
        self,
        *,
        corpus: str,
        options: Mapping[str, Any],
        subset_seed: int,
        listing_sha256: str,
        manifest_sha256: str,
        columns_sha256: str,
        audio: list[dict[str, Any]],
        samples: int,
        subsets: dict[str, dict[str, Any]],
        shared: Mapping[str, list[tuple[str, str]]],
    ) -> Summary:
        """What was gathered.

        Args:
            shared: audio that training shares, as `reproduce.data.splits.shared_audio` finds it.
        """
        seconds = {split: values for split, values in self._seconds.items() if values}
        return Summary(
            corpus=corpus,
            options=dict(options),
            subset_seed=subset_seed,
            listing_sha256=listing_sha256,
            manifest_sha256=manifest_sha256,
            samples=samples,
            utterances={split: len(self._seconds[split]) for split in SPLITS},
            hours={split: round(sum(self._seconds[split]) / 3600, 6) for split in SPLITS},
            speakers={split: sorted(self._speakers[split]) for split in SPLITS},
            lengths={
                split: {"shortest": min(v), "median": round(median(v), 3), "longest": max(v)}
                for split, v in seconds.items()
            },
            subsets=subsets,
            conversions=dict(self._conversions),
            rejected=self._rejected,
            warnings=[*self._warnings(corpus, options), *shared_lines(shared)],
            audio=audio,
            columns_sha256=columns_sha256,
        )

    def _warnings(self, corpus: str, options: Mapping[str, Any]) -> Iterable[str]:
        if corpus == "librispeech":
            for part, published in PUBLISHED.items():
                if (here := self._folders[part]) not in (0, published.utterances):
                    yield f"{part} has {here} utterances here, {published.utterances} as published"
        left_out = [item for item in self._rejected if item["split"] == "train" and item["id"]]
        if left_out:
            yield (
                f"{_count(len(left_out), 'training utterance')} rejected: subsets are drawn from "
                "the rest, so they aren't those of the whole corpus"
            )
        yield from self._duplicates(options)
        for split in ("train", "valid"):
            if not self._seconds[split]:
                yield f"there is no {split} utterance"
        for split in ("valid", "test"):
            if shared := sorted(self._speakers["train"] & self._speakers[split]):
                yield (
                    f"{_count(len(shared), 'speaker')} shared by train and {split}, so {split} "
                    f"results don't tell how unknown speakers fare: {_named(shared)}"
                )
        known = self._characters["train"]
        for (split, character), users in sorted(self._users.items()):
            if known and character not in known:  # without training all are unknown: said above
                yield (
                    f"the character {character!r} (U+{ord(character):04X}) of {split} transcripts "
                    f"is never seen in training: {_named(users)}"
                )
        if self._long:
            longest = max(max(values) for values in self._seconds.values() if values)
            yield (
                f"{_count(len(self._long), 'utterance')} longer than {LONG} s, up to {longest:.0f} "
                "s: fine-tuning reads each whole, in time and memory that grow faster than the "
                "length; cut them, or leave them out of it by finetune.max_seconds: "
                f"{_named(self._long)}"
            )
        if self._clipped:
            count = _count(len(self._clipped), "utterance")
            yield f"more than 1 % of samples clipped in {count}: {_named(self._clipped)}"

    def _duplicates(self, options: Mapping[str, Any]) -> Iterable[str]:
        for split in SPLITS:
            for part in options.get(f"{split}_parts") or ():
                start = f"{part}/"
                again = [
                    id_ for id_ in self._ids
                    if id_.startswith(start) and id_.removeprefix(start) in self._ids
                ]  # fmt: skip
                if again:
                    yield (
                        f"{_count(len(again), 'duplicate id')} in {part}, which an earlier part "
                        f"has too: written {part}/ID"
                    )
        rejected = [str(i["id"]) for i in self._rejected if i["reason"] == DUPLICATE]
        if rejected:
            yield (
                f"{_count(len(rejected), 'duplicate id')}, only the first utterance of each is "
                f"kept: {_named(rejected)}"
            )


def shared_lines(shared: Mapping[str, list[tuple[str, str]]]) -> list[str]:
    """A sentence on each split that shares audio with training."""
    return [
        f"the audio of {_count(len(pairs), f'{split} utterance')} is trained on too, the same "
        f"bytes, so {split} results are better than they would be on other speech: "
        + _named([f"{held_out} (train: {trained})" for held_out, trained in pairs])
        for split, pairs in shared.items()
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

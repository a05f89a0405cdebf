"""Characters of transcripts and CTC ids, in the file formats of Hugging Face's wav2vec 2.0.

Text form: NFC, white space as single spaces. Case stays as the corpus has it, except in the
wav2vec2 vocabulary, whose letters are upper case. A character is one code point, so a combining
mark that NFC can't compose is a token of its own.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from reproduce.errors import DataError, UsageError
from reproduce.records import write_text

VocabularyKind = Literal["corpus", "wav2vec2"]

PAD, BOS, EOS, UNKNOWN, DELIMITER = "<pad>", "<s>", "</s>", "<unk>", "|"
SPECIALS = (PAD, BOS, EOS, UNKNOWN, DELIMITER)
"""The first ids of every vocabulary; ``<pad>`` (0) is the CTC blank, ``|`` stands between words."""

WAV2VEC2_TOKENS = (*SPECIALS, *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""The 32 tokens of facebook/wav2vec2-base-960h, in its order."""

UNKNOWN_SHOWN = "\N{REPLACEMENT CHARACTER}"
"""What ``decode`` shows for ``<unk>``: visible, and one character long in an error count."""


def normalize_text(text: str) -> str:
    """NFC, white space runs (and ``|``, the delimiter's own sign) as one space, ends trimmed."""
    return " ".join(unicodedata.normalize("NFC", text).replace(DELIMITER, " ").split())


@dataclass(frozen=True)
class Decoder:
    """CTC ids to text.

    Args:
        shown: id -> what it shows as.
        blank: the id of the CTC blank.
    """

    shown: Mapping[int, str]
    blank: int
    lower: bool = False

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids that CTC has already collapsed, in single spaces.

        Raises:
            DataError: an id outside the vocabulary.
        """
        characters = []
        for id in ids:
            if id not in self.shown:
                raise DataError(f"id {id} in a vocabulary of {len(self.shown)}", where="vocabulary")
            characters.append(self.shown[id])
        text = " ".join("".join(characters).split())
        return text.lower() if self.lower else text

    @classmethod
    def of_tokenizer(
        cls, vocabulary: Mapping[str, Any], names: Mapping[str, Any], *, where: str = "vocab.json"
    ) -> Decoder:
        """Of any ``Wav2Vec2CTCTokenizer``.

        Args:
            vocabulary: token -> id (``vocab.json``, and ``added_tokens.json`` over it).
            names: ``tokenizer_config.json``: which tokens are the special ones.

        Raises:
            DataError: not such a mapping, or no blank in it.
        """
        if any(type(id) is not int for id in vocabulary.values()):
            raise DataError("not a mapping of tokens to ids", where=where)
        special = {name: _token(names.get(name, token)) for name, token in _SPECIAL_NAMES.items()}
        delimiter = _token(names.get("word_delimiter_token", DELIMITER))
        blank = special["pad_token"]
        if blank not in vocabulary:
            raise DataError(f"no token {blank!r}, the CTC blank", where=where)
        shown = {special["unk_token"]: UNKNOWN_SHOWN, delimiter: " "}
        shown |= dict.fromkeys((special["bos_token"], special["eos_token"], blank), "")
        lower = names.get("do_lower_case") is True
        by_id = {id: shown.get(token, token) for token, id in vocabulary.items()}
        return cls(by_id, vocabulary[blank], lower)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, beginning with ``SPECIALS``.

    Args:
        tokens: every token once; after the specials, single characters.
        upper: texts are upper-cased before they are encoded.

    Raises:
        DataError: the tokens are not such a list.
    """

    tokens: tuple[str, ...]
    upper: bool = False

    def __post_init__(self) -> None:
        if self.tokens[: len(SPECIALS)] != SPECIALS:
            first = " ".join(self.tokens[: len(SPECIALS)])
            raise DataError(
                f"the first tokens are {first or 'missing'}",
                where="vocabulary",
                do=f"they must be {' '.join(SPECIALS)}, as in Hugging Face's wav2vec 2.0",
            )
        characters = self.tokens[len(SPECIALS) :]
        if odd := [token for token in characters if len(token) != 1 or token.isspace()]:
            raise DataError(f"{odd[0]!r} is not one character, or is a space", where="vocabulary")
        if len(set(self.tokens)) != len(self.tokens):
            twice = next(token for token in characters if self.tokens.count(token) > 1)
            raise DataError(f"{twice!r} stands in it twice", where="vocabulary")

    @classmethod
    def from_transcripts(cls, texts: Iterable[str]) -> Vocabulary:
        """Every character of the texts, by code point; case as it is.

        Raises:
            DataError: there is no character at all.
        """
        found: set[str] = set()
        for text in texts:
            found.update(normalize_text(text))
        found.discard(" ")
        if not found:
            raise DataError(
                "the training transcripts hold no character",
                where="vocabulary",
                do="check the corpus's transcripts, or set vocabulary: wav2vec2",
            )
        return cls((*SPECIALS, *sorted(found)))

    @classmethod
    def wav2vec2(cls) -> Vocabulary:
        """The 32 tokens of facebook/wav2vec2-base-960h; text is upper-cased to meet them."""
        return cls(WAV2VEC2_TOKENS, upper=True)

    @classmethod
    def make(cls, kind: VocabularyKind, texts: Iterable[str] = ()) -> Vocabulary:
        """The vocabulary a recipe names: ``corpus`` (from `texts`) or ``wav2vec2``.

        Raises:
            UsageError: another kind.
            DataError: ``corpus``, and the texts hold no character.
        """
        if kind == "corpus":
            return cls.from_transcripts(texts)
        if kind == "wav2vec2":
            return cls.wav2vec2()
        raise UsageError(f"vocabulary: {kind!r}", do="corpus and wav2vec2 are known")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: id for id, token in enumerate(self.tokens)}

    @property
    def blank(self) -> int:
        """The id of the CTC blank."""
        return self.ids[PAD]

    def normalize(self, text: str) -> str:
        """The text as this vocabulary sees it: what `decode` gives back if nothing is unknown."""
        return normalize_text(text.upper() if self.upper else text)

    def encode(self, text: str) -> list[int]:
        """Ids of the normalized text; ``|`` between words, ``<unk>`` for unknown characters."""
        unknown = self.ids[UNKNOWN]
        return [
            self.ids.get(character, unknown)
            for character in self.normalize(text).replace(" ", DELIMITER)
        ]

    def unknown(self, text: str) -> set[str]:
        """The characters of the text that `encode` can only give as ``<unk>``."""
        return set(self.normalize(text)) - self.ids.keys() - {" "}

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids that CTC has already collapsed.

        ``<pad>``, ``<s>`` and ``</s>`` are dropped, ``<unk>`` shows as `UNKNOWN_SHOWN`; delimiters
        become single spaces, none at the ends.

        Raises:
            DataError: an id outside the vocabulary.
        """
        return self._decoder.decode(ids)

    @cached_property
    def _decoder(self) -> Decoder:
        shown = {id: _SHOWN.get(token, token) for id, token in enumerate(self.tokens)}
        return Decoder(shown, self.blank)

    def to_json(self) -> str:
        """``vocab.json`` of Hugging Face: token to id, in the order of ids."""
        return json.dumps(self.ids, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "vocab.json") -> Vocabulary:
        """Read ``vocab.json``; the wav2vec2 tokens bring their upper-casing with them.

        Raises:
            DataError: not a mapping of tokens to the ids 0, 1, ..., or not such a vocabulary.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", where=where) from error
        if not isinstance(raw, dict) or any(type(id) is not int for id in raw.values()):
            raise DataError("not a mapping of tokens to ids", where=where)
        tokens = tuple(sorted(raw, key=raw.__getitem__))
        if [raw[token] for token in tokens] != list(range(len(tokens))):
            raise DataError("the ids are not 0, 1, 2, ... without gaps", where=where)
        return cls(tokens, upper=tokens == WAV2VEC2_TOKENS)

    def save_tokenizer_files(self, folder: Path) -> None:
        """What ``transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)`` needs.

        Args:
            folder: made if absent.
        """
        files: dict[str, dict[str, Any]] = {
            "tokenizer_config.json": {
                "tokenizer_class": "Wav2Vec2CTCTokenizer",
                **_SPECIAL_NAMES,
                "word_delimiter_token": DELIMITER,
                "do_lower_case": False,
            },
            "special_tokens_map.json": _SPECIAL_NAMES,
        }
        write_text(folder / "vocab.json", self.to_json())
        for name, content in files.items():
            write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


_SHOWN = {PAD: "", BOS: "", EOS: "", UNKNOWN: UNKNOWN_SHOWN, DELIMITER: " "}
_SPECIAL_NAMES = {
    "pad_token": PAD,
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": UNKNOWN,
}


def _token(named: Any) -> str:
    """A special token, which tokenizer files write as itself or with options; "" for none."""
    if isinstance(named, dict):
        named = named.get("content")
    return named if isinstance(named, str) else ""

import json
import random
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from reproduce.data.vocabulary import SPECIALS, UNKNOWN_SHOWN, Decoder, Vocabulary, normalize_text
from reproduce.errors import DataError, UsageError

TEXTS = {
    "english": "DON'T GO, JOHN'S BOAT",
    "french": "l'été où ça gèle, œuvre",
    "greek": "Η ταχεία αλεπού",
    "cyrillic": "съешь ещё этих булок",
    "arabic": "مَرْحَبًا بالعالم",
    "hangul": "안녕하세요 세계",
    "hindi": "नमस्ते दुनिया",
    "han": "你好 世界",
    "beyond the BMP": "𐐀𐐁 𝒳",
    "uncomposable mark": "x̂ q̃ m̂",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_every_script_comes_back_in_nfc(text: str, form: Literal["NFC", "NFD"]) -> None:
    given = unicodedata.normalize(form, f"  {text}\n")
    vocabulary = Vocabulary.make("corpus", [given])
    assert vocabulary.unknown(given) == set()
    assert vocabulary.decode(vocabulary.encode(given)) == unicodedata.normalize("NFC", text)
    assert vocabulary.encode(given) == vocabulary.encode(unicodedata.normalize("NFC", text))
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_hangul_syllables_are_single_tokens_and_loose_marks_their_own() -> None:
    assert len(Vocabulary.make("corpus", [unicodedata.normalize("NFD", "한국")])) == 5 + 2
    assert Vocabulary.make("corpus", ["x̂"]).tokens[5:] == ("x", "\u0302")


def test_the_order_is_that_of_code_points_whatever_the_order_of_texts() -> None:
    texts = ["Zebra's été", "an apple", "БДА"]
    vocabulary = Vocabulary.from_transcripts(texts)
    assert vocabulary.tokens[:5] == SPECIALS
    assert list(vocabulary.tokens[5:]) == sorted(set("Zebra'sétéanappleБДА"))
    for seed in range(5):
        random.Random(seed).shuffle(texts)
        assert Vocabulary.from_transcripts(iter(texts)) == vocabulary


def test_case_stays_in_a_corpus_vocabulary_and_rises_in_wav2vec2() -> None:
    assert Vocabulary.make("corpus", ["aA"]).encode("aAa") == [6, 5, 6]
    vocabulary = Vocabulary.make("wav2vec2")
    assert vocabulary.decode(vocabulary.encode("don't Go")) == "DON'T GO"


def test_wav2vec2_has_the_ids_of_the_published_tokenizer() -> None:
    vocabulary = Vocabulary.wav2vec2()
    assert (len(vocabulary), vocabulary.blank) == (32, 0)
    known = {"<pad>": 0, "<unk>": 3, "|": 4, "E": 5, "A": 7, "H": 11, "'": 27, "X": 28, "Z": 31}
    assert {token: vocabulary.ids[token] for token in known} == known
    assert Vocabulary.from_json(vocabulary.to_json()).upper


def test_unknown_characters_are_reported_counted_and_shown() -> None:
    vocabulary = Vocabulary.make("corpus", ["ab c"])
    assert vocabulary.unknown("abé d|é") == {"é", "d"}
    assert vocabulary.encode("aé b") == [5, 3, 4, 6]
    assert vocabulary.decode([5, 3, 4, 6]) == f"a{UNKNOWN_SHOWN} b"


def test_space_is_one_delimiter_and_specials_are_silent() -> None:
    vocabulary = Vocabulary.make("corpus", ["a b"])
    assert vocabulary.encode(" a \u00a0\t b|a ") == [5, 4, 6, 4, 5]
    assert vocabulary.encode("  ") == []
    assert vocabulary.decode([4, 1, 5, 0, 4, 4, 6, 2, 4]) == "a b"
    assert vocabulary.decode([]) == ""
    assert normalize_text("e\u0301 |  b") == "é b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a mapping"),
        ('{"<pad>": true}', "not a mapping"),
        ('{"<pad>": 0, "<s>": 2}', "without gaps"),
        ('{"a": 0, "<pad>": 1}', "the first tokens are a <pad>"),
        ("{}", "the first tokens are missing"),
        ('{"<pad>":0,"<s>":1,"</s>":2,"<unk>":3,"|":4,"ab":5}', "'ab' is not one character"),
    ],
)
def test_a_bad_vocab_json_is_refused(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        Vocabulary.from_json(text)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(DataError, match="no character"):
        Vocabulary.make("corpus", ["", "  "])
    with pytest.raises(DataError, match="'a' stands in it twice"):
        Vocabulary((*SPECIALS, "a", "a"))
    with pytest.raises(DataError, match="id 9 in a vocabulary of 6"):
        Vocabulary.make("corpus", ["a"]).decode([9])
    with pytest.raises(DataError, match="id -1"):
        Vocabulary.make("corpus", ["a"]).decode([-1])
    with pytest.raises(UsageError, match="corpus and wav2vec2"):
        Vocabulary.make("bpe")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["wav2vec2", *TEXTS])
def test_transformers_decodes_and_encodes_alike(name: str, tmp_path: Path) -> None:
    tokenization = pytest.importorskip("transformers.models.wav2vec2.tokenization_wav2vec2")
    text = TEXTS.get(name, "DON'T STOP")
    vocabulary = Vocabulary.make("corpus" if name in TEXTS else "wav2vec2", [text])
    vocabulary.save_tokenizer_files(tmp_path)
    theirs = tokenization.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    assert theirs(vocabulary.normalize(text)).input_ids == vocabulary.encode(text)

    ours_only = {1, 2, 3}  # transformers spells <s>, </s> and <unk> out
    choices = [id for id in range(len(vocabulary)) if id not in ours_only]
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.choice(choices, 30).tolist()
        collapsed = [b for a, b in zip([None, *ids], ids) if a != b]
        assert vocabulary.decode(collapsed) == " ".join(theirs.decode(ids).split())


def test_the_saved_files_make_a_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = TEXTS["french"]
    vocabulary = Vocabulary.make("corpus", [text])
    vocabulary.save_tokenizer_files(tmp_path / "new")
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.get_vocab() == vocabulary.ids == json.loads(vocabulary.to_json())
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.word_delimiter_token_id == 4
    assert tokenizer.batch_decode([vocabulary.encode(text)], group_tokens=False) == [text]


def test_decoder_of_another_tokenizer() -> None:
    """Special tokens by other names and anywhere, as fine-tuned models of the hub have them."""
    ids = {"a": 0, "b": 1, "/": 2, "[UNK]": 3, "[PAD]": 4, "<s>": 5, "</s>": 6}
    names = {"pad_token": "[PAD]", "unk_token": {"content": "[UNK]"}, "word_delimiter_token": "/"}
    decoder = Decoder.of_tokenizer(ids, names)
    assert decoder.blank == 4
    assert decoder.decode([5, 0, 2, 2, 1, 4, 3, 6]) == "a b\N{REPLACEMENT CHARACTER}"
    lower = Decoder.of_tokenizer({"A": 0, "[PAD]": 1}, names | {"do_lower_case": True})
    assert lower.decode([0]) == "a"
    with pytest.raises(DataError, match="'<pad>', the CTC blank"):
        Decoder.of_tokenizer(ids, {})
    with pytest.raises(DataError, match="not a mapping of tokens to ids"):
        Decoder.of_tokenizer({"eng": {"a": 0}}, names)
    with pytest.raises(DataError, match="id 7"):
        decoder.decode([7])

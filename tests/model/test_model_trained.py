"""Finished recognizers: saved and loaded, in transformers and here, and speech to text."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reproduce.data.vocabulary import Vocabulary
from reproduce.errors import DataError
from reproduce.model import load_encoder, load_pretraining_model, load_recognizer
from reproduce.model.encoder import Encoder, EncoderConfig
from reproduce.model.folders import save_folder
from reproduce.model.interop import encoder_state_to_huggingface, save_huggingface
from reproduce.model.pretrainer import PretrainingModel
from reproduce.model.recognizer import HeadBank, Recognizer
from reproduce.model.rvq import RvqOptions
from reproduce.model.trained import save_recognizer

LETTERS = Vocabulary.from_transcripts(["ABC DE"])
GROUP = EncoderConfig(
    conv_channels=(8,) * 7,
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    position_kernel=8,
    position_groups=2,
)
LAYER = dataclasses.replace(
    GROUP, extractor="layer_norm", conv_bias=True, layer_norm_first=True, normalized=False
)
ARMS = {"no_rvq": 0, "rvq_2": 2}
BOTH = pytest.mark.parametrize("config", [GROUP, LAYER], ids=["group", "layer"])
EACH = pytest.mark.parametrize("arm", list(ARMS))


def recognizer(config: EncoderConfig = GROUP) -> Recognizer:
    """Heads so large that the likeliest token changes from frame to frame."""
    torch.manual_seed(0)
    heads = HeadBank(ARMS, 16, len(LETTERS), seed=3, options=RvqOptions(codes=9))
    assert heads.quantizers is not None
    heads.quantizers.codebooks.mul_(3)
    with torch.no_grad():
        for head in heads.heads.values():
            head.weight.mul_(50)  # type: ignore[operator]
    return Recognizer(Encoder(config), heads).eval()


def saved(folder: Path, arm: str, config: EncoderConfig = GROUP) -> Recognizer:
    model = recognizer(config)
    save_recognizer(folder, model, arm)
    LETTERS.save_tokenizer_files(folder)
    return model


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def noise(samples: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


@EACH
@BOTH
def test_there_and_back(config: EncoderConfig, arm: str, tmp_path: Path) -> None:
    model = saved(tmp_path, arm, config)
    back = load_recognizer(tmp_path)
    assert back.heads.arms == {arm: ARMS[arm]}
    assert not back.training
    assert back.encoder.config == config
    waveform = noise(4000, rows=2)
    assert torch.equal(back(waveform).logits[arm], model(waveform).logits[arm])
    ours, theirs = back.heads.arm_state(arm), model.heads.arm_state(arm)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@BOTH
def test_transformers_opens_a_recognizer_without_quantizer(
    config: EncoderConfig, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = saved(tmp_path, "no_rvq", config)
    theirs, report = transformers.AutoModelForCTC.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs) is transformers.Wav2Vec2ForCTC
    assert not any(report.values()), report
    assert (theirs.config.vocab_size, theirs.config.pad_token_id) == (len(LETTERS), 0)
    assert not (tmp_path / "modeling_w2vrep.py").exists()
    waveform = noise(4000, rows=2)
    with torch.no_grad():
        logits = theirs.eval()(waveform).logits
    torch.testing.assert_close(logits, model(waveform).logits["no_rvq"], rtol=1e-4, atol=1e-4)


# Transformers alone, in a process of its own: w2vrep is not to be imported.
OPEN = """
import sys
sys.modules["reproduce"] = None
import torch, transformers
model, report = transformers.AutoModelForCTC.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not any(report.values()), report
waveform, lengths = torch.load(sys.argv[2])
mask = torch.arange(waveform.shape[1]) < lengths[:, None]
with torch.no_grad():
    out = model.eval()(waveform, attention_mask=mask.long() if sys.argv[4] else None)
torch.save(out.logits, sys.argv[3])
if len(sys.argv) > 5:
    model.save_pretrained(sys.argv[5])
"""


@BOTH
def test_transformers_opens_a_quantized_recognizer_by_the_code_beside_it(
    config: EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    model = saved(folder, "rvq_2", config)
    waveform, lengths = noise(6000, rows=2), torch.tensor([6000, 6000])
    padded = config.extractor == "layer_norm"  # the others take no attention mask
    if padded:
        lengths[1] = 4000
        waveform[1, 4000:] = 0
    torch.save((waveform, lengths), tmp_path / "in.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out, again = tmp_path / "out.pt", tmp_path / "again"
    arguments = [str(folder), str(tmp_path / "in.pt"), str(out), "1" if padded else "", str(again)]
    subprocess.run([sys.executable, "-c", OPEN, *arguments], check=True, cwd=tmp_path)
    ours = model(waveform, lengths)
    theirs = torch.load(out)
    for row, frames in enumerate(ours.lengths.tolist()):
        torch.testing.assert_close(
            theirs[row, :frames], ours.logits["rvq_2"][row, :frames], rtol=1e-4, atol=1e-4
        )
    without = model.heads.head("rvq_2")(model.encode(waveform, lengths)[0])
    assert (without - ours.logits["rvq_2"]).abs().max() > 1  # the quantizer matters here

    # what transformers saves is the same model, to it and to us
    back = load_recognizer(again)
    assert torch.equal(back(waveform, lengths).logits["rvq_2"], ours.logits["rvq_2"])


def test_transformers_never_leaves_the_quantizer_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved(tmp_path, "rvq_2")
    for kind in ("Wav2Vec2ForCTC", "Wav2Vec2Model", "Wav2Vec2ForPreTraining"):
        with pytest.raises(ValueError, match=r"residual quantizer.*trust_remote_code=True"):
            getattr(transformers, kind).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCTC.from_pretrained(tmp_path, trust_remote_code=False)


@EACH
@BOTH
def test_the_processor_beside_it(config: EncoderConfig, arm: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved(tmp_path, arm, config)
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    extractor = processor.feature_extractor
    assert (extractor.sampling_rate, extractor.do_normalize) == (16_000, config.normalized)
    assert extractor.return_attention_mask is (config.extractor == "layer_norm")
    wave = (3 + 2 * noise(4000)[0]).numpy()
    out = processor(audio=wave, text="ABC DE", sampling_rate=16_000)
    assert abs(float(np.mean(out.input_values[0])) - (0 if config.normalized else 3)) < 0.1
    assert list(out.labels) == LETTERS.encode("ABC DE")


def test_encoders_of_quantized_recognizers_load(tmp_path: Path) -> None:
    model = saved(tmp_path, "rvq_2", LAYER)
    encoder = load_encoder(tmp_path)
    assert encoder.config == LAYER
    assert all(
        torch.equal(value, model.encoder.state_dict()[name])
        for name, value in encoder.state_dict().items()
    )


def test_loads_a_ctc_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**GROUP.to_huggingface(), vocab_size=10)
    theirs = transformers.Wav2Vec2ForCTC(config).eval()
    theirs.save_pretrained(tmp_path)
    waveform = noise(4000, rows=2)
    with torch.no_grad():
        expected = theirs(waveform).logits
        ours = load_recognizer(tmp_path)(waveform).logits["no_rvq"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"no vocab\.json"):
        load_recognizer(tmp_path).transcribe(waveform[0])


def test_folders_saved_before_the_quantizer_had_a_door(tmp_path: Path) -> None:
    """``Wav2Vec2ForCTC`` with ``rvq.*`` among the weights, as earlier versions wrote it."""
    model = saved(tmp_path, "rvq_2")
    edit(tmp_path, model_type="wav2vec2", feat_extract_norm="group")
    waveform = noise(4000)
    assert torch.equal(
        load_recognizer(tmp_path)(waveform).logits["rvq_2"], model(waveform).logits["rvq_2"]
    )


# ---------------------------------------------------------------------------------- another folder


def test_folders_of_another_kind_name_what_opens_them(tmp_path: Path) -> None:
    saved(tmp_path / "recognizer", "rvq_2")
    torch.manual_seed(0)
    save_huggingface(
        PretrainingModel(GROUP, codebooks=2, entries=4, codevector_dim=8, projection_dim=8),
        tmp_path / "pretrained",
    )
    state = encoder_state_to_huggingface(Encoder(GROUP), prefix="")
    save_folder(tmp_path / "bare", GROUP.to_huggingface(), state)
    for load, folder, message in (
        (load_pretraining_model, "recognizer", "holds a recognizer.*Open it with load_recognizer"),
        (load_recognizer, "pretrained", "holds a pretraining model.*with load_pretraining_model"),
        (load_recognizer, "bare", "holds an encoder alone, not a recognizer.*load_encoder"),
        (load_pretraining_model, "bare", "holds an encoder alone.*load_encoder"),
        (load_recognizer, ".", r"no config\.json"),
    ):
        with pytest.raises(DataError, match=f"(?s){message}"):
            load(tmp_path / folder)
    for folder in ("recognizer", "pretrained", "bare"):
        assert load_encoder(tmp_path / folder).config == GROUP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rvq": {"colour": "red"}}, r"w2vrep\.rvq\.colour: unknown"),
        ({"rvq": {"levels": "2"}}, r"w2vrep\.rvq\.levels is '2'"),
        ({"rvq": [2]}, r"w2vrep\.rvq is \[2\]"),
        ({"arm": 3}, r"w2vrep\.arm is 3"),
        ({"input_length": "none"}, r"w2vrep\.input_length is 'none'"),
        ({"extractor_gradient": "x"}, "extractor_gradient is 'x'"),
    ],
)
def test_our_section_of_the_configuration_is_checked(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path, "rvq_2")
    own = json.loads((tmp_path / "config.json").read_text())["w2vrep"]
    edit(tmp_path, w2vrep=own | changes)
    with pytest.raises(DataError, match=message):
        load_recognizer(tmp_path)


def test_a_head_that_does_not_fit(tmp_path: Path) -> None:
    saved(tmp_path, "no_rvq")
    state = load_file(tmp_path / "model.safetensors")
    for weight, message in ((torch.zeros(10), "isn't a matrix"), (torch.zeros(10, 3), "reads 3")):
        save_file(state | {"lm_head.weight": weight}, tmp_path / "model.safetensors")
        with pytest.raises(DataError, match=message):
            load_recognizer(tmp_path)


# ----------------------------------------------------------------------------------- transcription


@EACH
@BOTH
def test_transcribe_is_forward_and_greedy_decoding(
    config: EncoderConfig, arm: str, tmp_path: Path
) -> None:
    model = saved(tmp_path, arm, config)
    wave = 0.1 + 0.3 * noise(16_000)[0]
    seen = (wave - wave.mean()) / wave.std(correction=0) if config.normalized else wave
    with torch.no_grad():
        best = model(seen[None]).logits[arm][0].argmax(-1).unique_consecutive().tolist()
    expected = LETTERS.decode([token for token in best if token])
    assert len(expected) > 5
    trained = load_recognizer(tmp_path)
    assert trained.transcribe(wave) == expected
    assert trained.transcribe(wave[None].numpy()) == expected
    assert trained.transcribe(wave.double()) == expected


def test_sixteen_bit_samples_and_very_short_ones(tmp_path: Path) -> None:
    saved(tmp_path, "rvq_2", LAYER)
    trained = load_recognizer(tmp_path)
    pcm = (3000 * noise(8000)[0]).to(torch.int16)
    assert trained.transcribe(pcm) == trained.transcribe(pcm.float() / 32768)
    assert trained.transcribe(torch.zeros(0)) == trained.transcribe(torch.ones(399)) == ""


def test_long_recordings_are_read_in_windows(tmp_path: Path) -> None:
    """Each frame from one window, with the margins as context, and all frames there."""
    saved(tmp_path, "rvq_2", LAYER)
    trained = load_recognizer(tmp_path)
    samples = noise(5 * 16_000 + 123)[0].numpy()
    window, margin = 1.0, 0.2
    logits = trained._logits(samples, window, margin)
    total = trained.encoder.frames(len(samples))
    assert len(logits) == total == len(trained._logits(samples, 20.0, 2.0))
    size, spare = trained.encoder.frames(16_000), 10
    expected, start = [], 0
    while start + size < total:
        with torch.no_grad():
            piece = trained(torch.from_numpy(samples[start * 320 :][:16_000])[None])
        expected.append((start, piece.logits["rvq_2"][0]))
        start += size - 2 * spare
    for number, (start, piece) in enumerate(expected):
        first, last = spare if number else 0, size - spare
        torch.testing.assert_close(logits[start + first : start + last], piece[first:last])
    whole = trained(torch.from_numpy(samples)[None]).logits["rvq_2"][0]
    assert not torch.allclose(whole, logits, atol=1e-3)  # attention sees the window alone
    with torch.no_grad():
        last = trained(torch.from_numpy(samples[(total - size) * 320 :])[None]).logits["rvq_2"][0]
    torch.testing.assert_close(logits[-size + 2 * spare :], last[2 * spare :])


@pytest.mark.parametrize("seconds", [0.03, 0.99, 1.0, 1.02, 1.6, 1.62, 2.21])
def test_no_frame_is_lost_or_doubled(seconds: float, tmp_path: Path) -> None:
    saved(tmp_path, "no_rvq", LAYER)
    trained = load_recognizer(tmp_path)
    samples = noise(round(seconds * 16_000))[0].numpy()
    found = trained._logits(samples, 1.0, 0.2)
    assert len(found) == trained.encoder.frames(len(samples))


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(2, 100), r"found \[2, 100\]"),
        (torch.zeros(100, dtype=torch.int64), "found int64"),
        (torch.tensor([0.0, float("nan")]), "aren't finite"),
    ],
)
def test_what_cannot_be_transcribed(waveform: Tensor, message: str, tmp_path: Path) -> None:
    saved(tmp_path, "no_rvq")
    trained = load_recognizer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trained.transcribe(waveform)
    with pytest.raises(ValueError, match="leaves nothing"):
        trained.transcribe(torch.zeros(16_000), window=1.0, margin=0.5)


def test_a_vocabulary_that_is_not_the_heads(tmp_path: Path) -> None:
    saved(tmp_path, "no_rvq")
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 99}))
    with pytest.raises(DataError, match="the blank is 99"):
        load_recognizer(tmp_path).transcribe(torch.zeros(16_000))

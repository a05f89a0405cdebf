from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from reproduce.compat import import_torchaudio
from reproduce.errors import DataError
from reproduce.model.encoder import EncoderConfig
from reproduce.model.interop import (
    encoder_config_to_huggingface,
    encoder_state_to_huggingface,
    load_encoder,
    load_pretraining_model,
    save_folder,
    save_huggingface,
)
from reproduce.model.pretrainer import PretrainingModel

TINY = EncoderConfig(
    conv_channels=(32,) * 7,
    width=48,
    layers=2,
    heads=4,
    feed_forward=64,
    position_kernel=16,
    position_groups=4,
)
LAYER_NORM = dataclasses.replace(
    TINY, extractor="layer_norm", conv_bias=True, layer_norm_first=True, extractor_gradient=0.1
)
BOTH = pytest.mark.parametrize("config", [TINY, LAYER_NORM], ids=["group", "layer"])


def make(config: EncoderConfig = TINY, **options: Any) -> PretrainingModel:
    torch.manual_seed(0)
    return PretrainingModel(
        config, codebooks=4, entries=12, codevector_dim=32, projection_dim=24, **options
    ).eval()


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, folder / "model.safetensors")


@BOTH
def test_transformers_loads_ours_without_a_missing_or_unexpected_key(
    config: EncoderConfig, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(config)
    save_huggingface(model, tmp_path, extra_config={"num_negatives": 7})
    theirs, info = transformers.Wav2Vec2ForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.num_negatives == 7
    assert theirs.config.num_codevector_groups == 4
    waveform = torch.randn(2, 5000)
    with torch.no_grad():
        features = model.encoder(waveform).features
        torch.testing.assert_close(features, theirs.wav2vec2(waveform).last_hidden_state)


@BOTH
def test_there_and_back(config: EncoderConfig, tmp_path: Path) -> None:
    model = make(config, diversity="entropy", remove_collisions=False, temperature=0.2)
    save_huggingface(model, tmp_path / "model")
    back = load_pretraining_model(tmp_path / "model")
    assert same(back, model)
    assert back.encoder.config == config
    assert (back.diversity, back.remove_collisions, back.temperature) == ("entropy", False, 0.2)
    assert not back.training
    assert same(load_encoder(tmp_path / "model"), model.encoder)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"])
def test_encoders_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(**TINY.to_huggingface(), vocab_size=9)
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert not encoder.training
    waveform = torch.randn(2, 5000)
    with torch.no_grad():
        features, lengths = encoder(waveform, lengths=None)
        expected = getattr(theirs, "wav2vec2", theirs)(waveform).last_hidden_state
    torch.testing.assert_close(features, expected)
    assert lengths.tolist() == [expected.shape[1]] * 2


def test_older_weight_norm_and_pickled_weights(tmp_path: Path) -> None:
    model = make()
    save_huggingface(model, tmp_path)
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    assert sum(name.endswith(("weight_g", "weight_v")) for name in old) == 2
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    assert same(load_pretraining_model(tmp_path), model)


def test_pickled_weights_execute_nothing(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    save_huggingface(make(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wav2vec2.masked_spec_embed": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="can't be read"):
        load_encoder(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    edit_weights(
        tmp_path,
        **{
            "project_q.bias": None,
            "project_hid.weight": torch.zeros(3, 4),
            "wav2vec2.masked_spec_embed": None,
            "wav2vec2.surprise": torch.zeros(1),
        },
    )
    with pytest.raises(DataError) as caught:
        load_pretraining_model(tmp_path)
    message = str(caught.value)
    assert "missing: encoder.mask_embedding, project_q.bias" in message
    assert "unexpected: encoder.surprise" in message
    assert "project_hid.weight is [3, 4], not [24, 48]" in message
    assert str(tmp_path) in message
    with (
        pytest.raises(DataError, match="unexpected: surprise"),
        pytest.warns(UserWarning, match="mask embedding"),
    ):
        load_encoder(tmp_path)


def test_a_missing_mask_embedding_is_drawn_alike(tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    edit_weights(tmp_path, **{"wav2vec2.masked_spec_embed": None})
    with pytest.warns(UserWarning, match="mask embedding"):
        first, second = load_encoder(tmp_path), load_encoder(tmp_path)
    assert torch.equal(first.mask_embedding, second.mask_embedding)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "can't be read"),
    ],
)
def test_spoilt_folders(spoil: Any, message: str, tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    spoil(tmp_path)
    for load in (load_encoder, load_pretraining_model):
        with pytest.raises(DataError, match=message):
            load(tmp_path)


def test_impossible_head(tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_codevector_groups": 3}))
    with pytest.raises(DataError, match="multiple of 3"):
        load_pretraining_model(tmp_path)


def test_encoder_pieces_for_other_heads(tmp_path: Path) -> None:
    """What a recognizer saves loads in transformers as a CTC model."""
    transformers = pytest.importorskip("transformers")
    encoder = make().encoder
    state = encoder_state_to_huggingface(encoder) | {
        "lm_head.weight": torch.randn(9, 48),
        "lm_head.bias": torch.zeros(9),
    }
    save_folder(tmp_path, encoder_config_to_huggingface(encoder.config) | {"vocab_size": 9}, state)
    _, info = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same(load_encoder(tmp_path), encoder)


def bundle_model(config: EncoderConfig) -> torch.nn.Module:
    torch.manual_seed(1)
    model: torch.nn.Module = import_torchaudio().models.wav2vec2_model(
        config.extractor,
        [(32, k, s) for k, s in zip(config.conv_kernels, config.conv_strides, strict=True)],
        config.conv_bias, 48, 0.0, 16, 4, 2, 4, 0.1, 64, 0.1, 0.1, config.layer_norm_first, 0.1, 9,
    )  # fmt: skip
    return model.eval()


@BOTH
def test_torchaudio_bundle(config: EncoderConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = bundle_model(config)
    bundle = import_torchaudio().pipelines.Wav2Vec2Bundle
    monkeypatch.setattr(bundle, "get_model", lambda self: theirs)
    with pytest.warns(UserWarning, match="WAV2VEC2_BASE has no mask embedding"):
        encoder = load_encoder("WAV2VEC2_BASE")
    theirs.aux = None
    waveform = torch.randn(1, 5000)
    with torch.no_grad():
        torch.testing.assert_close(encoder(waveform).features, theirs(waveform)[0])


def test_torchaudio_bundle_offline_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_model(self: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(import_torchaudio().pipelines.Wav2Vec2Bundle, "get_model", get_model)
    with pytest.raises(DataError, match=r"(?s)can't fetch.*checkpoints"):
        load_encoder("WAV2VEC2_BASE")
    with pytest.raises(DataError, match="WAV2VEC2_BASE"):
        load_encoder("WAV2VEC2_BSAE")


def test_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_huggingface(make(), tmp_path)
    asked = []

    def download(repository: str, filename: str, revision: str) -> str:
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    commit = "abc1" * 10
    assert same(load_encoder(f"someone/model@{commit}"), make().encoder)
    assert ("someone/model", "model.safetensors", commit) in asked
    load_encoder("facebook/wav2vec2-base")
    assert len(asked[-1][2]) == 40  # a commit, not a branch
    with pytest.raises(DataError, match="someone/model@COMMIT"):
        load_encoder("someone/model")
    for moving in ("main", "v1.0", "abc123"):
        with pytest.raises(DataError, match=f"'{moving}' is not a commit"):
            load_encoder(f"someone/model@{moving}")


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:

    def download(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError) as caught:
        load_encoder("facebook/wav2vec2-base")
    for part in ("no network", "pytorch_model.bin", "models/wav2vec2-base", "huggingface.co"):
        assert part in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(DataError, match="no config"):
        load_pretraining_model(tmp_path / "nothing")


def test_the_package_is_light_until_it_is_used() -> None:
    probe = (
        "import sys, reproduce.model as m; assert 'torch' not in sys.modules; "
        "assert callable(m.load_encoder) and callable(m.load_pretraining_model); "
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from reproduce.compat import import_torchaudio
from reproduce.errors import DataError
from reproduce.model.encoder import EncoderConfig
from reproduce.model.folders import save_folder
from reproduce.model.interop import (
    encoder_config_to_huggingface,
    encoder_state_to_huggingface,
    load_encoder,
    load_pretraining_model,
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
        "preprocessor_config.json",
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


# --------------------------------------------------------------------------- what real folders hold


def spoil_weights(folder: Path, weights: object) -> Path:
    """pytorch_model.bin in the place of model.safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def edit_json(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


@pytest.mark.parametrize("place", ["model", "state_dict", "model_state_dict"])
def test_weights_nested_in_a_trainers_checkpoint(place: str, tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    spoil_weights(tmp_path, {"epoch": 3, "optimizer": {"lr": 0.1}, place: state})
    assert same(load_pretraining_model(tmp_path), make())


@pytest.mark.filterwarnings("ignore:.*mask embedding")
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model": {"cfg": {}, "model": {"x": torch.zeros(1)}}}, "under 'model' the entry 'cfg'"),
        ({"state_dict": {"x": torch.zeros(1)}}, "unexpected: x"),
        ([torch.zeros(1)], "holds a list; names and tensors are wanted"),
        (torch.zeros(1), "holds a tensor; names and tensors are wanted"),
        (3.0, "holds a float"),
        ({0: torch.zeros(1)}, "the entry 0 is a tensor"),
        ({"x": 3}, "the entry 'x' is an int"),
        ({}, "missing: "),
    ],
)
def test_weights_that_are_no_names_and_tensors(
    weights: object, message: str, tmp_path: Path
) -> None:
    save_huggingface(make(), tmp_path)
    spoil_weights(tmp_path, weights)
    with pytest.raises(DataError, match=re.escape(message)):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("mask_emb", "post_extract_proj.weight"),
        ("feature_extractor.conv_layers.0.0.weight", "encoder.layers.0.self_attn.k_proj.weight"),
        ("w2v_encoder.w2v_model.encoder.pos_conv.0.weight_g",),
    ],
)
def test_fairseqs_names_are_refused_by_name(names: tuple[str, ...], tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    spoil_weights(tmp_path, {"model": {name: torch.zeros(1) for name in names}})
    with pytest.raises(DataError, match=r"(?s)fairseq's names: .*convert_wav2vec2") as caught:
        load_encoder(tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    edit_weights(tmp_path, **{"project_q.bias": torch.zeros(24, dtype=torch.int8)})
    with pytest.raises(DataError, match=r"no floating-point numbers: project_q\.bias is int8"):
        load_pretraining_model(tmp_path)


def test_half_precision_weights(tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({n: v.half() for n, v in state.items()}, tmp_path / "model.safetensors")
    back = load_pretraining_model(tmp_path)
    assert back.project_q.weight.dtype == torch.float32
    torch.testing.assert_close(back.project_q.weight, make().project_q.weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size is '48': input should be a valid integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 48.5}, "hidden_size is 48.5"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"num_hidden_layers": [2]}, r"num_hidden_layers is \[2\]"),
        ({"conv_dim": 32}, "conv_dim is 32: input should be a valid list"),
        ({"conv_dim": [32, "32"]}, "conv_dim is"),
        ({"conv_stride": {}}, "conv_stride is {}"),
        ({"conv_bias": "no"}, "conv_bias is 'no'"),
        ({"do_stable_layer_norm": 1}, "do_stable_layer_norm is 1"),
        ({"layerdrop": float("nan")}, "layerdrop is nan"),
        ({"hidden_dropout": 1.5}, "hidden_dropout is 1.5"),
        ({"hidden_dropout": 2, "layerdrop": "x"}, "hidden_dropout is 2.*layerdrop is 'x'"),
        ({"feat_extract_norm": ["group"]}, "feat_extract_norm is"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": 480_000_000}, "mask_embedding is .48., not .480000000."),
        ({"num_codevector_groups": "4"}, "num_codevector_groups is '4'"),
        ({"contrastive_logits_temperature": 0}, "contrastive_logits_temperature is 0"),
        ({"w2vrep": [1]}, r"w2vrep is \[1\], not an object"),
        ({"w2vrep": {"diversity": "none"}}, "diversity is 'none'"),
        ({"w2vrep": {"extractor_gradient": "1"}}, "extractor_gradient is '1'"),
    ],
)
def test_values_of_wrong_types_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_huggingface(make(), tmp_path)
    edit_json(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_pretraining_model(tmp_path)


@pytest.mark.parametrize("key", ["conv_bias", "do_stable_layer_norm", "add_adapter"])
def test_null_is_off_where_transformers_takes_it_for_off(key: str, tmp_path: Path) -> None:
    save_huggingface(make(), tmp_path)
    edit_json(tmp_path, **{key: None})
    encoder = load_encoder(tmp_path)
    assert same(encoder, make().encoder)
    assert encoder.config == TINY


@pytest.mark.parametrize(
    ("said", "normalized"),
    [
        (None, True),
        ({}, True),
        ({"do_normalize": True, "sampling_rate": 16000}, True),
        ({"do_normalize": False}, False),
        ({"do_normalize": None}, False),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_how_an_encoder_wants_its_input(
    said: dict[str, Any] | None, normalized: bool, nested: bool, tmp_path: Path
) -> None:
    save_huggingface(make(), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    if said is not None and nested:
        edit_json(tmp_path, "processor_config.json", feature_extractor=said)
    elif said is not None:
        edit_json(tmp_path, "preprocessor_config.json", **said)
    model = load_pretraining_model(tmp_path)
    assert model.encoder.config.normalized is load_encoder(tmp_path).config.normalized is normalized
    save_huggingface(model, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert (written["do_normalize"], written["sampling_rate"]) == (normalized, 16_000)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sampling_rate": 8000}, "sampling_rate is 8000, known is 16000"),
        ({"sampling_rate": None}, "sampling_rate is None"),
        ({"sampling_rate": "16000"}, "sampling_rate is '16000'"),
        ({"feature_size": 80}, "feature_size is 80"),
        ({"padding_value": -1.0}, "padding_value is -1.0"),
        ({"do_normalize": "false"}, "do_normalize is 'false'"),
        ({"do_normalize": 0}, "do_normalize is 0"),
        ({"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, "feature_extractor_type is 'S"),
        ({"do_normalize": 1, "sampling_rate": 8000}, "do_normalize is 1.*sampling_rate is 8000"),
    ],
)
def test_an_input_that_is_not_ours_is_refused(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_huggingface(make(), tmp_path)
    edit_json(tmp_path, "preprocessor_config.json", **said)
    with pytest.raises(DataError, match=message) as caught:
        load_encoder(tmp_path)
    assert "preprocessor_config.json" in caught.value.where


def test_transformers_reads_how_a_pretrained_model_wants_its_input(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for config in (TINY, dataclasses.replace(LAYER_NORM, normalized=False)):
        save_huggingface(make(config), tmp_path)
        theirs = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
        assert theirs.do_normalize is config.normalized
        assert theirs.sampling_rate == 16_000
        assert theirs.return_attention_mask is (config.extractor == "layer_norm")


def test_bundles_say_how_they_want_their_input(monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines = import_torchaudio().pipelines
    for wrapped in (False, True):
        theirs = bundle_model(TINY)
        if wrapped:
            theirs = pipelines._wav2vec2.utils._extend_model(theirs, normalize_waveform=True)
        monkeypatch.setattr(pipelines.Wav2Vec2Bundle, "get_model", lambda self, m=theirs: m)
        with pytest.warns(UserWarning, match="mask embedding"):
            assert load_encoder("WAV2VEC2_BASE").config.normalized is wrapped


def test_a_hub_encoder_whose_input_is_not_known_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_huggingface(make(), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    raised: type[Exception] = huggingface_hub.errors.LocalEntryNotFoundError

    def download(repository: str, filename: str, revision: str) -> str:
        if not (tmp_path / filename).exists():
            raise raised(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.warns(UserWarning, match=r"preprocessor_config.json can't be fetched"):
        load_encoder("facebook/wav2vec2-base")
    raised = huggingface_hub.errors.EntryNotFoundError  # the hub has none
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_encoder("facebook/wav2vec2-base")
    edit_json(tmp_path, "preprocessor_config.json", do_normalize=False)
    assert not load_encoder("facebook/wav2vec2-base").config.normalized

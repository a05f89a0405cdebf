"""What is done with finished models: their cards, transcription, the hub."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import constants
from tiny_runs import make_work, tiny_recipe

from reproduce.cli import main
from reproduce.data.manifest import Manifest
from reproduce.errors import DataError
from reproduce.model import load_recognizer
from reproduce.records import RunFolder, RunRecord, WorkFolder
from reproduce.stages.finetune import finetune
from reproduce.stages.pretrain import pretrain
from reproduce.tasks.card import write_card
from reproduce.training.distributed import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    """One pretraining run, and two of fine-tuning so short that they don't write blanks alone."""
    work = make_work(tmp_path_factory.mktemp("models"))
    recipe = tiny_recipe(
        "as-written", work, "seeds=[1]", "pretrain.updates=2", "finetune.updates=3"
    )
    pretrain(recipe, work, ONE, ["no_icsl_2cb"], [1])
    finetune(recipe, work, ONE, ["no_rvq", "rvq_2"], [1])
    return work


@pytest.fixture
def recognizer(work: WorkFolder) -> RunFolder:
    return work.run("finetune", "rvq_2", 1)


def w2vrep(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return (int(done.value.code or 0), *capsys.readouterr())


# ------------------------------------------------------------------------------------------- cards


def test_each_finished_model_has_its_card(work: WorkFolder) -> None:
    for stage, arm in (("pretrain", "no_icsl_2cb"), ("finetune", "no_rvq"), ("finetune", "rvq_2")):
        run = work.run(stage, arm, 1)  # type: ignore[arg-type]
        card = (run.model / "README.md").read_text(encoding="utf-8")
        record = RunRecord.read(run.record)
        final = record.final["valid"]
        assert f"# {arm}, seed 1, of " in card
        assert record.manifest_sha256 in card
        shown = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", card, re.M))
        if stage == "pretrain":
            row = f"| {final['contrastive_loss']:.4f} | {final['chance_loss']:.4f} |"
            assert f"| contrastive loss, nats a masked frame {row}" in card
            assert "load_pretraining_model(PATH)" in card
        else:
            assert shown["word error rate"] == f"{final['wer']:.4f}"
            assert f"| character error rate | {final['cer']:.4f} | 1 |" in card
            assert ("trust_remote_code=True" in card) is (arm == "rvq_2")
        assert str(work.root) not in card
        assert "16 kHz mono, with zero mean" in card


@pytest.mark.parametrize(
    ("changes", "caveat"),
    [
        ({"outcome": "all_blank"}, "**It recognizes nothing**: most of its transcripts are empty"),
        ({"final": {"valid": {"wer": 1.0}}}, "not below that of empty text"),
        ({"final": {"valid": {"wer": 0.99}}}, ""),
        ({"final": {"valid": {"contrastive_loss": 4.61, "chance_loss": 4.6}}}, "knows nothing"),
        ({"final": {"valid": {"contrastive_loss": 4.5, "chance_loss": 4.6}}}, ""),
    ],
)
def test_a_card_says_first_that_a_model_knows_nothing(
    recognizer: RunFolder, work: WorkFolder, changes: dict[str, object], caveat: str, tmp_path: Path
) -> None:
    copy = WorkFolder(tmp_path / "w").run("finetune", "rvq_2", 1)
    shutil.copytree(recognizer.root, copy.root)
    record = RunRecord.read(copy.record)
    record.outcome = "ok"
    for name, value in changes.items():
        setattr(record, name, value)
    record.settings["finetune"]["encoder"] = "/home/someone/models/base"
    record.write(copy.record)
    write_card(WorkFolder(tmp_path / "w"), copy)
    card = (copy.model / "README.md").read_text(encoding="utf-8")
    first = card.partition("## Caveats")[2].strip().splitlines()[0]
    assert caveat in first
    assert ("nothing" in first) is bool(caveat)
    assert "someone" not in card
    assert "| encoder | base; trained" in card


def test_a_model_finished_before_gets_its_card(work: WorkFolder, tmp_path: Path) -> None:
    shutil.copytree(work.root, tmp_path / "w")
    copy = WorkFolder(tmp_path / "w")
    card = copy.run("pretrain", "no_icsl_2cb", 1).model / "README.md"
    before = card.read_text(encoding="utf-8")
    card.unlink()
    recipe = tiny_recipe("as-written", copy, "seeds=[1]", "pretrain.updates=2")
    pretrain(recipe, copy, ONE, ["no_icsl_2cb"], [1])
    assert card.read_text(encoding="utf-8") == before


# -------------------------------------------------------------------------------------- transcribe


@pytest.fixture
def speech(work: WorkFolder, tmp_path: Path) -> list[Path]:
    """The validation utterances as files of several formats, as long as their hypotheses."""
    manifest = Manifest.read(work.data)
    rows = manifest.select(split="valid").to_pandas()
    files = []
    for number, (_, row) in enumerate(rows.iterrows()):
        file = tmp_path / f"{row['id']}.{('wav', 'flac')[number % 2]}"
        soundfile.write(file, manifest.audio.slice(int(row["offset"]), int(row["samples"])), 16_000)
        files.append(file)
    return files


def hypotheses(run: RunFolder) -> dict[str, str]:
    with run.hypotheses.open(encoding="utf-8") as file:
        return {row["id"]: row["hypothesis"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("arm", ["no_rvq", "rvq_2"])
def test_transcripts_are_those_of_validation(
    work: WorkFolder, arm: str, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = work.run("finetune", arm, 1)
    expected = hypotheses(run)
    assert sum(map(len, expected.values())) > 10  # it writes something
    code, out, _ = w2vrep(capsys, "transcribe", run.model, *speech, "--device", "cpu")
    assert code == 0
    assert out.splitlines() == [f"{file}\t{expected[file.stem]}" for file in speech]
    code, out, _ = w2vrep(capsys, "transcribe", run.model, *speech, "--format", "jsonl")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in found] == [expected[file.stem] for file in speech]
    assert [row["file"] for row in found] == list(map(str, speech))
    for row, file in zip(found, speech, strict=True):
        assert row["seconds"] == pytest.approx(soundfile.info(file).duration, abs=1e-3)
    code, out, _ = w2vrep(capsys, "transcribe", run.model, speech[0])
    assert out == expected[speech[0].stem] + "\n"


def test_other_rates_channels_and_long_files(
    recognizer: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    mono = 0.1 * rng.standard_normal(48_000 * 45)
    soundfile.write(tmp_path / "long.wav", np.stack([mono, mono], 1), 48_000)
    code, out, _ = w2vrep(
        capsys, "transcribe", recognizer.model, tmp_path / "long.wav", "--format", "jsonl"
    )
    assert code == 0
    assert json.loads(out)["seconds"] == 45.0
    from reproduce.data.audio import Decoded, decode, pack

    packed = pack(Decoded(*decode((tmp_path / "long.wav").read_bytes()), sha256=""))
    trained = load_recognizer(recognizer.model)
    assert json.loads(out)["text"] == trained.transcribe(packed.samples)


def test_files_that_cannot_be_read_keep_none_from_being_transcribed(
    recognizer: RunFolder, speech: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    broken, none = speech[0].with_name("broken.wav"), speech[0].with_name("none.wav")
    broken.write_text("no sound")
    files = [broken, speech[0], none, speech[0].parent]
    code, out, err = w2vrep(capsys, "transcribe", recognizer.model, *files, "--format", "jsonl")
    assert code == 3
    found = [json.loads(line) for line in out.splitlines()]
    assert ["error" in row for row in found] == [True, False, True, True]
    assert found[1]["text"] == hypotheses(recognizer)[speech[0].stem]
    assert f"{broken}: can't be decoded" in err
    assert f"{none}: No such file or directory" in err
    assert "3 of 4 files can't be transcribed" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("pretrain/no_icsl_2cb/seed-1/model", "Open it with load_pretraining_model"),
        ("finetune/rvq_2/seed-1", "Its model is in"),
        ("nothing", "no config.json"),
    ],
)
def test_folders_without_a_recognizer(
    work: WorkFolder, folder: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = w2vrep(capsys, "transcribe", work.root / folder, "a.wav")
    assert (code, out) == (3, "")
    assert message in err
    assert len(err.splitlines()) <= 2


# --------------------------------------------------------------------------------------------- hub


@pytest.fixture
def push(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command, which meets this hub alone and nobody's token."""

    def run(server: hub.Hub | None, *arguments: object, token: str = "") -> tuple[int, str, str]:
        url = server.url if server else "http://127.0.0.1:9"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # large files as LFS sends them: the newer protocol is that of one server
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        return w2vrep(capsys, "push", *arguments)

    return run


def test_push(push: Callable[..., Any], recognizer: RunFolder, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(recognizer.model, model)
    (model / "notes.txt").write_text("not for others")
    (model / ".model.safetensors.1.tmp").write_text("half")
    with hub.running() as server:
        code, _, err = push(server, model, "me/mine")
        assert code == 2
        assert "hf auth login" in err
        assert "Traceback" not in err
        assert server.files == {}

        code, out, err = push(server, model, "me/mine", "--private", token=hub.TOKEN)
        assert code == 0, err
        assert out == f"pushed: {server.url}/me/mine\n"
        found = server.files["me/mine"]
        assert sorted(found) == sorted(
            ["README.md", "config.json", "model.safetensors", "modeling_w2vrep.py", "vocab.json",
             "preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json"]
        )  # fmt: skip
        for name, content in found.items():
            assert content == (model / name).read_bytes(), name
        assert server.private == {"me/mine": True}
        assert len(server.messages) == 1

        # what arrived is the model
        for name, content in found.items():
            (tmp_path / "back").mkdir(exist_ok=True)
            (tmp_path / "back" / name).write_bytes(content)
        waveform = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
        arrived, sent = load_recognizer(tmp_path / "back"), load_recognizer(model)
        assert arrived.transcribe(waveform) == sent.transcribe(waveform)


def test_push_makes_a_missing_card(
    push: Callable[..., Any], work: WorkFolder, tmp_path: Path
) -> None:
    shutil.copytree(work.root, tmp_path / "w")
    model = WorkFolder(tmp_path / "w").run("pretrain", "no_icsl_2cb", 1).model
    card = (model / "README.md").read_bytes()
    (model / "README.md").unlink()
    with hub.running() as server:
        code, _, err = push(server, model, "me/it", token=hub.TOKEN)
        assert code == 0, err
        assert server.files["me/it"]["README.md"] == card


def test_what_cannot_be_pushed(
    push: Callable[..., Any], recognizer: RunFolder, tmp_path: Path
) -> None:
    from reproduce.stages.push import push as stage

    with pytest.raises(DataError, match=r"config\.json and model\.safetensors not there"):
        stage(tmp_path, "me/it")
    shutil.copytree(recognizer.model, tmp_path / "alone")
    (tmp_path / "alone" / "README.md").unlink()
    with pytest.raises(DataError, match=r"no model card, README\.md, and no run"):
        stage(tmp_path / "alone", "me/it")
    for name, code, message in (
        ("me/it", 3, "the hub can't be reached: Conn"),
        ("me/i t", 2, "NAME me/i t: Repo id must"),
    ):
        found, _, err = push(None, recognizer.model, name, token="x")
        assert (found, message in err, "Traceback" in err) == (code, True, False), err

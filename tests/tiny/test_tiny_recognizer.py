"""A tiny recognizer, trained whole by the real stages on eight utterances, learns to read them.

That needs the right targets, a CTC loss with the right gradient, an encoder that is really trained,
and a decoder that undoes what the vocabulary did.
"""

from __future__ import annotations

import csv
from pathlib import Path

import jiwer
import pytest
import torch

from reproduce.data.audio import to_float
from reproduce.data.batches import Speech
from reproduce.data.manifest import Manifest
from reproduce.data.vocabulary import Vocabulary
from reproduce.model import load_recognizer
from reproduce.objective.ctc import greedy_decode
from reproduce.recipe import load_recipe
from reproduce.records import RunFolder, RunRecord, WorkFolder
from reproduce.stages.finetune import finetune
from reproduce.stages.prepare import prepare
from reproduce.stages.pretrain import pretrain
from reproduce.training.distributed import Ranks

SIZE = """
seeds: [1]
data:
  corpus: synthetic
  subset: all
  vocabulary: corpus
  jobs: 1
  synthetic:
    {hours: 0.005, valid_hours: 0.001, speakers: 2, valid_speakers: 1, max_seconds: 3.0}
model:
  extractor: layer_norm
  layer_norm_first: true
  conv_bias: true
  conv_channels: [16, 16, 16, 32, 32, 32, 32]
  width: 64
  layers: 2
  heads: 4
  feed_forward: 128
  position_kernel: 32
  position_groups: 4
  dropout: 0.0
  attention_dropout: 0.0
  projection_dropout: 0.0
  activation_dropout: 0.0
  layer_drop: 0.0
pretrain:
  arms: [no_icsl_2cb]
  updates: 1
  batch_size: 2
  accumulation: 1
  min_seconds: 0.0
  quantizer: {entries: 8, codevector_dim: 32, projection_dim: 16}
finetune:
  arms: [no_rvq]
  encoder: no_icsl_2cb/seed-1
  train: all
  transformer_from: 0.0
  updates: 280
  batch_size: 4
  accumulation: 1
  optimizer: {learning_rate: 3.0e-3}
  schedule: {warmup: 0.1, hold: 0.75, decay: 0.15}
  masking: {probability: 0.0, channel_probability: 0.0}
  validation: {every: 280}
compute: {device: cpu}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("tiny")
    (root / "size.yaml").write_text(SIZE, encoding="utf-8")
    recipe = load_recipe(f"corrected+{root / 'size.yaml'}")
    work, ranks = WorkFolder(root), Ranks(0, 1, torch.device("cpu"))
    prepare(recipe, work)
    pretrain(recipe, work, ranks, ["no_icsl_2cb"], [1])
    finetune(recipe, work, ranks, ["no_rvq"], [1])
    return work.run("finetune", "no_rvq", 1)


def speech_of(run: RunFolder, split: str) -> Speech:
    manifest = Manifest.read(WorkFolder(run.root.parents[2]).data)
    return Speech(manifest.select(split=split), manifest.audio)


def transcribe(model: Path, speech: Speech) -> list[str]:
    """Each utterance by itself, through what the run left behind."""
    recognizer = load_recognizer(model)
    vocabulary = Vocabulary.from_json((model / "vocab.json").read_text(encoding="utf-8"))
    found = []
    for position in range(len(speech)):
        batch = speech.collate([position])
        with torch.no_grad():
            out = recognizer(batch.waveform, batch.lengths)
        (ids,) = greedy_decode(out.logits["no_rvq"].argmax(-1), out.lengths, vocabulary.blank)
        found.append(vocabulary.decode(ids))
    return found


def hypotheses(run: RunFolder) -> list[dict[str, str]]:
    with open(run.hypotheses, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_eight_utterances_are_learnt(run: RunFolder) -> None:
    speech = speech_of(run, "train")
    assert len(speech) == 8
    assert jiwer.cer(list(speech.texts), transcribe(run.model, speech)) < 0.1


@pytest.mark.slow
def test_hypotheses_and_metrics_are_what_the_saved_model_says(run: RunFolder) -> None:
    speech, rows = speech_of(run, "valid"), hypotheses(run)
    texts = [row["hypothesis"] for row in rows]
    assert [row["id"] for row in rows] == list(speech.ids)
    assert [row["reference"] for row in rows] == list(speech.texts)
    assert texts == transcribe(run.model, speech)
    assert all(texts)
    for row in rows:
        found = jiwer.process_words(row["reference"], row["hypothesis"])
        assert int(row["errors"]) == found.substitutions + found.deletions + found.insertions
    final = RunRecord.read(run.record).final["valid"]
    assert final["wer"] == pytest.approx(jiwer.wer(list(speech.texts), texts))
    assert final["cer"] == pytest.approx(jiwer.cer(list(speech.texts), texts))


@pytest.mark.slow
def test_transformers_reads_the_same_from_the_folder(run: RunFolder) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Wav2Vec2ForCTC.from_pretrained(run.model).eval()
    processor = transformers.Wav2Vec2Processor.from_pretrained(run.model)
    for split in ("train", "valid"):
        speech = speech_of(run, split)
        sounds = [
            to_float(speech.audio.slice(speech.rows.at("offset", n), int(samples)))
            for n, samples in enumerate(speech.samples)
        ]
        inputs = processor(sounds, sampling_rate=16_000, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(**inputs).logits
        frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))
        ids = [row[:count].argmax(-1) for row, count in zip(logits, frames.tolist(), strict=True)]
        texts = [" ".join(text.split()) for text in processor.batch_decode(ids)]
        assert texts == transcribe(run.model, speech)

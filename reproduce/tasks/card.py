"""The model card: README.md of a finished run's ``model/``, made from the run's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from reproduce.data.summary import Summary
from reproduce.errors import DataError
from reproduce.records import AT_CHANCE_MARGIN, RunFolder, RunRecord, WorkFolder, write_text

CARD = "README.md"
STUDY = (
    'Fonseka and Thayasivam, "Boosting wav2vec2 Performance in Low-Resource Speech Recognition via '
    'Enhanced Pretraining and Fine-Tuning", 2025'
)
_OUTCOMES = {
    "at_chance": "**It knows nothing**: its contrastive loss is that of a model that guesses.",
    "collapsed": "**Its codebooks collapsed**: fewer than two codes of each are in use.",
    "all_blank": "**It recognizes nothing**: most of its transcripts are empty.",
    "diverged": "**It diverged**: its losses aren't finite.",
}
_PRETRAIN_ROWS = (
    ("contrastive_loss", "contrastive loss, nats a masked frame", "chance_loss"),
    ("speech_loss", "the same over frames of speech", "speech_chance"),
    ("perplexity", "codes in use (perplexity, all codebooks together)", "codebooks"),
    ("code_nmi", "information that codebooks share (NMI over its baseline)", "zero"),
)
_FINETUNE_ROWS = (
    ("wer", "word error rate", "one"),
    ("cer", "character error rate", "one"),
    ("ctc_loss", "CTC loss, nats a character", None),
    ("blank_rate", "share of blank frames", "one"),
)


def write_card(work: WorkFolder, run: RunFolder) -> None:
    """Write the card of a finished run beside its weights, from run.json and data/summary.json.

    Raises:
        DataError: the run has no record that can be read.
    """
    try:
        record = RunRecord.read(run.record)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"run.json can't be read: {error}", where=run.name) from None
    recipe = yaml.safe_load(work.recipe.read_text(encoding="utf-8")) if work.recipe.exists() else {}
    data = Summary.read(work.summary) if work.summary.exists() else None
    text = "\n".join(_lines(run, record, recipe or {}, data))
    write_text(run.model / CARD, text.rstrip() + "\n")


def _lines(
    run: RunFolder, record: RunRecord, recipe: dict[str, Any], data: Summary | None
) -> Iterator[str]:
    recognizer = run.stage == "finetune"
    name = str(recipe.get("name", "unknown"))
    yield "---"
    yield "library_name: transformers"
    if recognizer:
        yield "pipeline_tag: automatic-speech-recognition"
    yield "tags: [wav2vec2, w2vrep]"
    yield "---"
    yield f"# {run.arm}, seed {run.seed}, of {name}"
    yield ""
    yield (
        f"{_what(run, record)} It was trained by w2vrep, which reproduces a study ({STUDY}), to "
        "compare arms and seeds: it is one run of an experiment, not a product."
    )
    yield ""
    yield "## Numbers"
    yield ""
    yield f"On validation, after {record.updates} of {record.updates_planned} updates:"
    yield ""
    yield from _numbers(run, record)
    yield ""
    yield "## Caveats"
    yield ""
    yield from (f"- {text}" for text in _caveats(run, record, recipe, data))
    yield ""
    yield "## What it was made from"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {key} | {value} |" for key, value in _origin(run, record, name, data))
    yield ""
    yield "## Loading"
    yield ""
    yield from _loading(run, record)


def _section(run: RunFolder, record: RunRecord) -> dict[str, Any]:
    section = record.settings.get(run.stage)
    return section if isinstance(section, dict) else {}


def _what(run: RunFolder, record: RunRecord) -> str:
    section = _section(run, record)
    if run.stage == "pretrain":
        quantizer = section.get("quantizer", {})
        codebooks, weight = quantizer.get("codebooks", "?"), section.get("icsl", {}).get("weight")
        icsl = f", inter-codebook similarity loss at weight {weight}" if weight else ""
        return (
            f"A pretrained wav2vec 2.0 with {codebooks} codebooks of "
            f"{quantizer.get('entries', '?')} entries{icsl}."
        )
    rvq = section.get("rvq", {})
    if rvq.get("levels"):
        return (
            "A wav2vec 2.0 recognizer: a residual quantizer of "
            f"{rvq['levels']} levels x {rvq.get('codes', '?')} codes before the CTC head."
        )
    return "A wav2vec 2.0 recognizer: a CTC head, without a residual quantizer."


def _numbers(run: RunFolder, record: RunRecord) -> Iterator[str]:
    final = record.final.get("valid", {})
    quantizer = _section(run, record).get("quantizer", {})
    codes = quantizer.get("codebooks", 0) * quantizer.get("entries", 0)
    known = {"one": "1", "zero": "0", "codebooks": f"of {codes}"}
    yield "| | this model | a model that knows nothing |"
    yield "|---|---|---|"
    for column, what, chance in _PRETRAIN_ROWS if run.stage == "pretrain" else _FINETUNE_ROWS:
        value = final.get(column)
        if value is None:
            continue
        beside = known.get(chance or "", "")
        if not beside and chance is not None:
            guessing = final.get(chance)
            beside = "" if guessing is None else f"{guessing:.4f}"
        yield f"| {what} | {value:.4f} | {beside} |"
    yield ""
    if run.stage == "pretrain":
        yield "Guessing scores the mean of ln(1 + kept negatives) over the same frames."
    else:
        yield "An empty transcript scores a word and a character error rate of 1, all frames blank."


def _caveats(
    run: RunFolder, record: RunRecord, recipe: dict[str, Any], data: Summary | None
) -> Iterator[str]:
    final = record.final.get("valid", {})
    wer, loss, chance = (final.get(key) for key in ("wer", "contrastive_loss", "chance_loss"))
    if record.outcome in _OUTCOMES:
        yield _OUTCOMES[record.outcome]
    elif wer is not None and wer >= 1:
        yield "**It recognizes nothing**: its word error rate is not below that of empty text."
    elif loss is not None and chance is not None and loss >= chance - AT_CHANCE_MARGIN:
        yield "**It knows nothing**: guessing scores no worse a contrastive loss."
    seeds = recipe.get("seeds")
    more = len(seeds) - 1 if isinstance(seeds, list) else 0
    others = f"the {more} others" if more > 1 else "another"
    yield f"One seed; {others} may end elsewhere. The report compares them."
    yield "Its numbers are of the validation set that it was watched on, not of a test set."
    if data is not None and data.corpus == "synthetic":
        yield "**Trained on synthetic speech**: it has never heard a human voice."
    said = run.model / "preprocessor_config.json"
    if said.exists():
        normalized = json.loads(said.read_text(encoding="utf-8")).get("do_normalize", True)
        scale = "with zero mean and unit variance an utterance" if normalized else "as recorded"
        yield f"It wants 16 kHz mono, {scale} (`{said.name}`)."
    yield "No license is stated: that of the speech it was trained on may bind you."


def _origin(
    run: RunFolder, record: RunRecord, name: str, data: Summary | None
) -> Iterator[tuple[str, str]]:
    from reproduce.report.privacy import without_paths

    settings, section = record.settings, _section(run, record)
    yield "recipe, arm, seed", f"{name}, {run.arm}, {run.seed}"
    if run.stage == "finetune":
        encoder = without_paths(str(section.get("encoder", "?")).replace("{seed}", str(run.seed)))
        yield "encoder", f"{encoder}; trained: {section.get('train', '?')}"
        for key in ("encoder_sha256", "encoder_commit"):
            if key in settings:
                yield key.replace("_", " "), str(settings[key])
    if data is not None:
        subset = str(settings.get("data", {}).get("subset", "all"))
        train = data.subsets.get(subset, {})
        hours = train.get("hours", data.hours.get("train", 0.0))
        utterances = train.get("utterances", data.utterances.get("train", 0))
        yield (
            "speech",
            f"corpus {data.corpus}, subset {subset}: {utterances} utterances, {hours:.2f} h",
        )
        valid = data.hours.get("valid", 0.0)
        yield "validation", f"{data.utterances.get('valid', 0)} utterances, {valid:.2f} h"
    yield "manifest sha256", record.manifest_sha256
    seconds = record.final.get("train", {}).get("audio_seconds")
    seen = "" if seconds is None else f", {seconds / 3600:.2f} h of audio heard"
    yield "training", f"{record.updates} updates{seen}, {record.wall_seconds:.0f} s"
    yield "on", f"{record.device}, {record.precision}, processes: {record.world_size}"
    yield "versions", ", ".join(f"{what} {version}" for what, version in record.versions.items())
    if record.git is not None:
        yield "commit", record.git


def _loading(run: RunFolder, record: RunRecord) -> Iterator[str]:
    quantized = bool(_section(run, record).get("rvq", {}).get("levels"))
    yield "```python"
    if run.stage == "pretrain":
        yield "from reproduce.model import load_pretraining_model  # w2vrep"
        yield ""
        yield "model = load_pretraining_model(PATH)"
        yield ""
        yield "from transformers import Wav2Vec2ForPreTraining"
        yield ""
        yield "model = Wav2Vec2ForPreTraining.from_pretrained(PATH)"
    else:
        yield "from reproduce.model import load_recognizer  # w2vrep"
        yield ""
        yield "text = load_recognizer(PATH).transcribe(waveform)  # [T] samples at 16 kHz"
        yield ""
        yield "from transformers import AutoModelForCTC, Wav2Vec2Processor"
        yield ""
        trust = ", trust_remote_code=True" if quantized else ""
        yield f"model = AutoModelForCTC.from_pretrained(PATH{trust})"
        yield "processor = Wav2Vec2Processor.from_pretrained(PATH)"
    yield "```"
    if quantized:
        yield ""
        yield "`Wav2Vec2ForCTC` refuses it: without the quantizer it would be another model."
    if run.stage == "finetune":
        yield ""
        yield "Or `w2vrep transcribe PATH FILE...`."

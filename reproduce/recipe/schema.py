"""What a recipe can say: sections, defaults, the source of each constant.

The defaults are the protocol ``as-written``: what the paper says, and the wav2vec 2.0 base value
where it is silent. ``as-run`` and ``corrected`` are recipe files that hold differences only.

Sources are abbreviated: *paper* (Fonseka and Thayasivam 2025), *w2v2* (Baevski et al. 2020 and its
fairseq base configuration), *hf* (transformers' defaults), *ours* (a choice of this toolkit).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

SectionT = TypeVar("SectionT", bound="Section")

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Duration = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(s|min|h)$")]


def key(default: Any, description: str, source: str) -> Any:
    """A recipe key with its description and the source of its default."""
    extra: JsonDict = {"source": source}
    if isinstance(default, list | dict | BaseModel):
        factory = functools.partial(copy.deepcopy, default)
        return Field(default_factory=factory, description=description, json_schema_extra=extra)
    return Field(default=default, description=description, json_schema_extra=extra)


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def with_overrides(self: SectionT, overrides: dict[str, Any]) -> SectionT:
        """This section with dotted keys replaced, validated again.

        Raises:
            pydantic.ValidationError: a key or value that doesn't fit.
        """
        values = self.model_dump()
        for path, value in overrides.items():
            *parents, last = path.split(".")
            inner = values
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        return type(self).model_validate(values)


class Synthetic(Section):
    """The embedded synthesizer."""

    hours: Positive = key(0.5, "hours of training speech", "ours")
    valid_hours: Positive = key(0.05, "hours of validation speech", "ours")
    speakers: Count = key(8, "training speakers", "ours")
    valid_speakers: Count = key(2, "validation speakers, none of the training ones", "ours")
    seed: Natural = key(0, "seed of texts, speakers and sounds", "ours")
    min_seconds: Positive = key(2.0, "shortest utterance, s", "ours")
    max_seconds: Positive = key(15.0, "longest utterance, s", "ours")
    words: Annotated[int, Field(ge=2)] | None = key(
        None, "only this many words of each kind, common ones first", "ours"
    )


class Data(Section):
    """Which speech."""

    corpus: Literal["librispeech", "folder", "parquet", "synthetic"] = key(
        "librispeech", "where the speech comes from", "paper: LibriSpeech clean"
    )
    root: str | None = key(None, "folder of the corpus on this machine", "the user")
    train_parts: list[str] = key(
        ["train-clean-100"],
        "LibriSpeech parts to train on; corpus parquet: also folders, shards, patterns",
        "as run, most likely; not recorded",
    )
    valid_parts: list[str] = key(["dev-clean"], "the same, to validate on", "paper")
    test_parts: list[str] = key([], "the same, held out", "ours")
    download: bool = key(False, "librispeech: fetch parts that aren't in the root", "ours")
    download_url: str = key(
        "https://www.openslr.org/resources/12", "librispeech: where their archives are", "OpenSLR"
    )
    archives_sha256: dict[str, str] = key(
        {}, "librispeech: SHA-256 by part, for archives other than OpenSLR's", "ours"
    )
    transcripts: str | None = key(
        None, "folder corpus: CSV, TSV or JSONL of transcripts, in the root or a path", "the user"
    )
    valid_fraction: Fraction = key(
        0.1, "folder corpus without a split column: share of validation", "ours"
    )
    subset: Literal["10min", "1h", "10h", "all"] = key("10h", "training subset", "paper: 10 hours")
    subset_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = key(
        None, "required SHA-256 of the subset's list, data/subset_NAME.tsv", "ours"
    )
    allow_overlap: bool = key(
        True, "false: refuse audio of training, the same bytes, in validation or test", "ours"
    )
    subset_seed: Natural = key(42, "seed of the permutation behind the subsets", "as run")
    vocabulary: Literal["corpus", "wav2vec2"] = key(
        "wav2vec2",
        "CTC tokens: the characters of the training transcripts, or the 32 of wav2vec2-base",
        "as run",
    )
    jobs: Natural = key(0, "decoding processes; 0: one a core", "ours")
    synthetic: Synthetic = key(Synthetic(), "the synthetic corpus", "ours")


class Model(Section):
    """wav2vec 2.0's shape."""

    extractor: Literal["group_norm", "layer_norm"] = key("group_norm", "norm of the CNN", "w2v2")
    conv_channels: list[Count] = key([512] * 7, "channels of each convolution", "w2v2")
    conv_kernels: list[Count] = key([10, 3, 3, 3, 3, 2, 2], "kernel of each convolution", "w2v2")
    conv_strides: list[Count] = key([5, 2, 2, 2, 2, 2, 2], "stride of each convolution", "w2v2")
    conv_bias: bool = key(False, "bias in the convolutions", "w2v2 base")
    width: Count = key(768, "transformer width", "w2v2 base")
    layers: Count = key(12, "transformer layers", "w2v2 base")
    heads: Count = key(12, "attention heads", "w2v2 base")
    feed_forward: Count = key(3072, "inner width of the feed-forward layers", "w2v2 base")
    position_kernel: Count = key(128, "kernel of the positional convolution", "w2v2")
    position_groups: Count = key(16, "groups of the positional convolution", "w2v2")
    layer_norm_first: bool = key(False, "normalize before each block", "w2v2 base")
    dropout: Fraction = key(0.1, "dropout of hidden states", "hf")
    attention_dropout: Fraction = key(0.1, "dropout of attention weights", "hf")
    activation_dropout: Fraction = key(0.1, "dropout inside the feed-forward layers", "hf")
    projection_dropout: Fraction = key(0.0, "dropout after the feature projection", "hf")
    layer_drop: Fraction = key(0.1, "probability to skip a layer in training", "hf")


class Optimizer(Section):
    """AdamW."""

    learning_rate: Positive = key(1e-4, "peak learning rate", "paper")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = key(
        [0.9, 0.98], "moment decay rates", "w2v2"
    )
    eps: Positive = key(1e-6, "denominator floor", "w2v2")
    weight_decay: NonNegative = key(0.01, "decoupled weight decay", "w2v2")
    clip_norm: Positive | None = key(None, "largest gradient norm; null: no clipping", "paper: -")


class Schedule(Section):
    """Learning rate over the updates, as fractions of the schedule's length."""

    kind: Literal["linear", "tri_stage", "constant"] = key(
        "linear",
        "linear: warm-up, then linearly to 0; tri_stage: warm-up, hold, decay",
        "paper",
    )
    warmup: Fraction = key(0.1, "share of the length spent warming up", "paper")
    hold: Fraction = key(0.0, "tri_stage: share at the peak", "w2v2")
    decay: Fraction = key(0.0, "tri_stage: share decaying", "w2v2")
    decay_form: Literal["exponential", "linear"] = key(
        "exponential", "tri_stage: how the rate falls to final_scale of its peak", "w2v2"
    )
    final_scale: NonNegative = key(0.05, "tri_stage: last rate over the peak rate", "w2v2")
    length: Positive = key(1.0, "the schedule's length over the run's length", "paper")
    counted_in: Literal["updates", "micro_batches"] = key(
        "updates",
        "what the length counts; the schedule steps once an update in either case",
        "paper",
    )


class Masking(Section):
    """Span masks over frames."""

    probability: Fraction = key(0.65, "share of frames that begin a span, times length", "w2v2")
    length: Count = key(10, "frames a span", "w2v2")
    min_spans: Natural = key(2, "least spans an utterance", "hf")
    spans_drawn: Literal["utterance", "batch"] = key(
        "utterance", "what the random part of the number of spans is drawn for", "w2v2"
    )


class FinetuneMasking(Masking):
    """Span masks over frames and channels."""

    channel_probability: Fraction = key(0.0, "the same for channels", "w2v2")
    channel_length: Count = key(64, "channels a span", "w2v2 base_10h")


class Contrastive(Section):
    """InfoNCE over the masked frames of an utterance (paper, eq. 4)."""

    negatives: Count = key(100, "K, drawn with replacement", "w2v2")
    temperature: Positive = key(0.1, "kappa", "w2v2")
    remove_collisions: bool = key(True, "drop negatives whose code is the positive's", "w2v2")


class Diversity(Section):
    """Use of the codebook entries (paper, eq. 1)."""

    weight: NonNegative = key(0.1, "lambda_d", "w2v2")
    form: Literal["entropy", "perplexity"] = key(
        "entropy", "1 - H/log V, or (GV - perplexity)/GV as in transformers", "paper, eq. 1"
    )


class Icsl(Section):
    """Inter-codebook similarity loss (paper, eq. 2 and 3)."""

    weight: NonNegative = key(0.0, "lambda_s; the arms set it", "paper, eq. 3")
    form: Literal["signed", "squared"] = key("signed", "cosines or their squares", "paper, eq. 2")
    pairs: Literal["mean", "paper"] = key(
        "paper", "mean over pairs, or the paper's 1/(G(G-1)), half of it", "paper, eq. 2"
    )
    scaling: Literal["per_frame", "as_run"] = key(
        "per_frame",
        "beside the mean loss a frame, or added once to the loss summed over frames",
        "paper, eq. 3",
    )
    divided_by_accumulation: bool = key(
        True, "as_run scaling: inside the factor 1/accumulation", "as run: false for 2 codebooks"
    )


class Quantizer(Section):
    """Gumbel product quantizer."""

    codebooks: Annotated[int, Field(ge=1, le=32)] = key(2, "G; the arms set it", "w2v2")
    entries: Annotated[int, Field(ge=2)] = key(320, "V, entries a codebook", "w2v2")
    codevector_dim: Count = key(256, "dimension of all codebooks together", "w2v2 base")
    projection_dim: Count = key(256, "dimension the loss compares in", "w2v2 base")
    init: Literal["uniform", "normal"] = key("uniform", "U(0, 1) or N(0, 1) codevectors", "hf")
    dropout: Fraction = key(0.0, "dropout of the quantizer's input", "hf")


class Gumbel(Section):
    """Temperature of the Gumbel softmax."""

    start: Positive = key(2.0, "first temperature", "w2v2")
    floor: Positive = key(0.5, "last temperature", "w2v2 base")
    factor: Annotated[float, Field(gt=0.0, le=1.0)] | None = key(
        0.999995, "times an update; null: geometric from start to floor over the run", "w2v2"
    )


class Validation(Section):
    """When and on what losses are measured."""

    every: Count | Literal["epoch"] = key("epoch", "updates between validations", "as run")
    batch_size: Count = key(
        8,
        "utterances a batch; the numbers depend on it where padding counts as speech: in all "
        "group-norm pretraining, and in fine-tuning with padded input lengths (as-run)",
        "ours",
    )
    max_utterances: Count | None = key(None, "validate on this many at most", "ours")


class PretrainValidation(Validation):
    """When and on what losses are measured, and with which masks."""

    every: Count | Literal["epoch"] = key(
        100,
        "updates between validations; at 100 all of dev-clean takes some 6 % of the time, each "
        "epoch (41 updates) 13 %",
        "ours; as run: epoch",
    )
    redraw: bool = key(False, "draw masks and negatives anew each time", "ours")
    initial: bool = key(False, "before the first update too", "ours")


class FinetuneValidation(Validation):
    """When and on what losses are measured."""

    every: Count | Literal["epoch"] = key(
        200,
        "updates between validations; with kept features all of dev-clean then takes some 9 % of "
        "the time, each epoch (45 updates) 30 %",
        "ours; as run: epoch",
    )


class Stage(Section):
    """What pretraining and fine-tuning share."""

    updates: Count = key(2200, "optimizer steps", "paper")
    batch_size: Count = key(16, "utterances a micro-batch", "paper")
    accumulation: Count = key(4, "micro-batches an update", "paper")
    epoch_end: Literal["carry", "short"] = key(
        "carry",
        "carry: batches run on into the next epoch; short: the last ones of an epoch are smaller",
        "ours",
    )
    gradient: Literal["summed", "averaged", "rescaled"] = key(
        "summed",
        "summed: over all frames or utterances of the update, divided once; averaged: each "
        "micro-batch's mean over accumulation; rescaled: divided by the masked count after every "
        "micro-batch, so that earlier ones nearly vanish",
        "w2v2",
    )
    input_length: Literal["utterance", "padded"] = key(
        "utterance",
        "frames that masks and CTC see: an utterance's own, or all of the batch",
        "ours",
    )
    batches: Literal["bucketed", "shuffled"] = key(
        "bucketed",
        "bucketed: utterances of similar length together, so that little is padded; shuffled: any",
        "ours; as run: shuffled",
    )
    batch_seconds: Positive | None = key(
        None, "bucketed: seconds of audio a micro-batch at most, with padding", "ours"
    )
    min_seconds: NonNegative = key(0.0, "only utterances longer than this, s", "paper")
    max_seconds: Positive | None = key(None, "leave out longer utterances, s", "ours")
    optimizer: Optimizer = key(Optimizer(), "AdamW", "paper")
    schedule: Schedule = key(Schedule(), "learning rate", "paper")
    masking: Masking = key(Masking(), "span masks", "w2v2")
    validation: Validation = key(Validation(), "validation", "ours")
    log_every: Count = key(10, "updates a train row", "as run")
    checkpoint_every: Count | Duration = key(
        "10min", "time between checkpoints (30s, 10min, 1h), or a number of updates", "ours"
    )


class Pretrain(Stage):
    """The pretraining stage and its grid."""

    min_seconds: NonNegative = key(5.0, "only utterances longer than this, s", "paper")
    crop_seconds: Positive | None = key(15.6, "crop longer utterances to this, s", "w2v2: 250000")
    crop: Literal["start", "random"] = key("random", "where the crop lies", "w2v2")
    extractor_gradient: NonNegative = key(1.0, "factor on the extractor's gradient", "hf")
    validation: PretrainValidation = key(PretrainValidation(), "validation", "ours")
    contrastive: Contrastive = key(Contrastive(), "contrastive loss", "w2v2")
    diversity: Diversity = key(Diversity(), "diversity loss", "paper, eq. 1")
    icsl: Icsl = key(Icsl(), "inter-codebook similarity loss", "paper, eq. 2")
    quantizer: Quantizer = key(Quantizer(), "product quantizer", "w2v2")
    gumbel: Gumbel = key(Gumbel(), "Gumbel softmax", "w2v2")
    gradient_share_every: Count = key(
        10, "updates between measurements of ICSL's share of the codebooks' gradient", "ours"
    )
    arms: dict[str, dict[str, Any]] = key(
        {
            f"{'' if icsl else 'no_'}icsl_{codebooks}cb": {"quantizer.codebooks": codebooks}
            | ({"icsl.weight": 0.1} if icsl else {})
            for codebooks in (2, 4, 8, 16)
            for icsl in (False, True)
        },
        "arm -> dotted keys of this section",
        "paper, table 1 and fig. 4",
    )


class Rvq(Section):
    """Residual vector quantization before the CTC head (paper, eq. 5 to 7)."""

    levels: Natural = key(0, "L; 0: none; the arms set it", "paper")
    codes: Annotated[int, Field(ge=2)] = key(256, "codes a level", "as run")
    decay: Fraction = key(0.99, "EMA decay of the codebooks", "as run")
    ema: Literal["micro_batch", "update"] = key(
        "update", "when codebooks move; micro_batch is exact for one process only", "ours"
    )
    padding: bool = key(False, "padded frames take part", "ours; as run: true")
    kmeans_init: bool = key(False, "first codebooks by k-means of the first update", "as run")
    revive_below: NonNegative | None = key(
        None, "replace codes whose EMA cluster size is under this; null: never", "as run"
    )
    commitment: NonNegative = key(
        0.0, "weight of the commitment loss, a mean over the update's frames", "paper: CTC alone"
    )
    straight_through: bool = key(False, "gradients pass to the encoder", "as run: none needed")


class Finetune(Stage):
    """The fine-tuning stage and its grid."""

    encoder: str = key(
        "facebook/wav2vec2-base",
        "ARM/seed-N of this work folder (finetune/ARM/seed-N: that of a fine-tuned arm, to go on "
        "from), a path, a hub name (@COMMIT pins another commit) or a torchaudio bundle; "
        "{seed} in it is the run's own seed",
        "paper",
    )
    train: Literal["head", "transformer", "all"] = key(
        "head", "what is trained; transformer: all but the extractor", "as run"
    )
    encoder_mode: Literal["eval", "train"] = key(
        "eval",
        "train = head: whether dropout and masking stay on in the frozen encoder; else they do",
        "ours",
    )
    transformer_from: Fraction = key(
        0.0,
        "share of the updates before it is trained; until then it is frozen, with dropout and "
        "masking on as in training",
        "w2v2: freeze_finetune_updates",
    )
    updates: Count = key(1500, "optimizer steps", "paper")
    batch_size: Count = key(8, "utterances a micro-batch", "paper")
    accumulation: Count = key(8, "micro-batches an update", "paper")
    optimizer: Optimizer = key(Optimizer(betas=[0.9, 0.999], eps=1e-8), "AdamW", "as run")
    schedule: Schedule = key(
        Schedule(
            kind="tri_stage", warmup=0.2, hold=0.2, decay=0.6, decay_form="linear", final_scale=0.0
        ),
        "learning rate; the hold is that of an earlier version of the paper",
        "paper",
    )
    masking: FinetuneMasking = key(
        FinetuneMasking(probability=0.0), "span masks", "as run in eval mode: none"
    )
    subset: Literal["10min", "1h", "10h", "all"] | None = key(
        None, "training subset; null: data.subset", "ours"
    )
    keep_features: Literal["no", "float32", "float16"] = key(
        "float32",
        "where the frozen encoder is deterministic (encoder_mode eval, lengths by utterance), its "
        "features are computed once and kept on disk; an hour of speech takes 0.55 GB in float32 "
        "at width 768",
        "ours",
    )
    validation: FinetuneValidation = key(FinetuneValidation(), "validation", "ours")
    head_dropout: Fraction = key(0.0, "dropout before the linear head", "ours")
    rvq: Rvq = key(Rvq(), "residual quantizer", "paper")
    arms: dict[str, dict[str, Any]] = key(
        {"no_rvq": {"rvq.levels": 0}}
        | {f"rvq_{levels}": {"rvq.levels": levels} for levels in (1, 2, 4, 8, 16)},
        "arm -> dotted keys of this section",
        "paper, table 2 and fig. 5",
    )


class Compute(Section):
    """On what and how exactly."""

    device: Literal["auto", "cpu", "cuda"] = key("auto", "device", "ours")
    precision: Literal["float32", "tf32", "bf16"] = key(
        "float32",
        "arithmetic of the encoder and the heads; quantizers, similarities and losses are computed "
        "in float32",
        "as run",
    )
    threads: Count | None = key(
        None, "CPU threads of a process; null: torch's choice, or a worker's share", "ours"
    )
    processes: Count = key(
        1, "processes of a run, a GPU each; they share an update's micro-batches", "ours"
    )
    compile: bool = key(False, "torch.compile the encoder's transformer blocks", "ours")
    prefetch: Count = key(
        2,
        "updates (in validation: batches) read before they are due; decides no number",
        "ours",
    )
    readers: Count = key(2, "threads that read them; decides no number", "ours")


class Cluster(Section):
    """What ``--cluster slurm`` asks for, a job; names are submitit's. Decides no number."""

    timeout_min: Count = key(720, "a job's time limit, minutes; it goes on in another one", "ours")
    max_timeouts: Natural = key(100, "so many others at most", "ours")
    nodes: Count = key(1, "machines that compute.processes are spread over", "ours")
    gpus_per_node: Natural | None = key(
        None, "GPUs a machine; null: one a process, none where compute.device is cpu", "ours"
    )
    cpus_per_task: Count = key(4, "CPU cores a process", "ours")
    mem_gb: Positive | None = key(None, "memory a machine, GB; null: the cluster's choice", "ours")
    slurm_partition: str | None = key(None, "partition; null: the cluster's choice", "the user")
    slurm_account: str | None = key(None, "who pays", "the user")
    slurm_qos: str | None = key(None, "quality of service", "the user")
    slurm_constraint: str | None = key(None, "features of the machines", "the user")
    slurm_signal_delay_s: Count = key(
        120, "seconds before the time limit at which a checkpoint is asked for", "ours"
    )
    slurm_array_parallelism: Count = key(256, "jobs of the array at a time", "submitit")
    slurm_setup: list[str] = key([], "shell lines before a job (module load ...)", "the user")
    slurm_additional_parameters: dict[str, Any] = key(
        {}, "other options of sbatch, names without --", "the user"
    )


class Recipe(Section):
    """One experiment: a protocol at a size."""

    name: str = key("as-written", "name of the recipe", "ours")
    description: str = key("", "one line", "ours")
    seeds: Annotated[list[Natural], Field(min_length=1)] = key([42], "seeds of the grid", "as run")
    data: Data = key(Data(), "which speech", "paper")
    model: Model = key(Model(), "wav2vec 2.0's shape", "w2v2 base")
    pretrain: Pretrain = key(Pretrain(), "pretraining", "paper")
    finetune: Finetune = key(Finetune(), "fine-tuning", "paper")
    compute: Compute = key(Compute(), "devices and precision", "ours")
    cluster: Cluster = key(Cluster(), "jobs of a cluster; not among a run's settings", "ours")

    def pretrain_arm(self, arm: str) -> Pretrain:
        """The pretraining section with an arm's overrides in place."""
        return self.pretrain.with_overrides({**self.pretrain.arms[arm], "arms": {}})

    def finetune_arm(self, arm: str) -> Finetune:
        """The fine-tuning section with an arm's overrides in place."""
        return self.finetune.with_overrides({**self.finetune.arms[arm], "arms": {}})

    def settings(self, stage: Literal["pretrain", "finetune"], arm: str) -> dict[str, Any]:
        """What decides a run's numbers, beside its seed and data: for run.json and its hash.

        Where the corpus lies, how many processes decode and which device runs are left out.
        """
        section = self.pretrain_arm(arm) if stage == "pretrain" else self.finetune_arm(arm)
        values = {
            stage: section.model_dump(exclude={"arms", "checkpoint_every"}),
            "data": self.data.model_dump(include={"subset", "vocabulary"}),
            "compute": self.compute.model_dump(include={"precision", "compile"}),
        }
        return values | {"model": self.model.model_dump()}

    def prepare_settings(self) -> dict[str, Any]:
        """What decides a manifest."""
        where = {"download", "download_url", "archives_sha256"}
        later = {"jobs", "subset", "subset_sha256", "allow_overlap", "vocabulary"}
        return self.data.model_dump(exclude=where | later)


def duration_seconds(text: str) -> float:
    """Seconds of ``30s``, ``10min`` or ``1.5h``."""
    for unit, seconds in (("min", 60.0), ("s", 1.0), ("h", 3600.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * seconds
    raise ValueError(f"not a duration: {text!r}")


def settings_sha256(settings: dict[str, Any]) -> str:
    """Hash of settings, independent of key order."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

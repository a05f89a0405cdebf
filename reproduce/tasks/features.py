"""Encode once: a deterministic encoder's features in the work folder, for all arms and seeds."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack

import torch
from tqdm import tqdm

from reproduce.data.batches import Speech
from reproduce.data.features import FeatureFile, FeatureType
from reproduce.errors import W2vrepError
from reproduce.model.encoder import Encoder
from reproduce.model.recognizer import Recognizer
from reproduce.tasks.context import Context
from reproduce.tasks.wiring import autocast

FORMAT = 1
"""Of the files; another one is another name."""
TOGETHER = {"cpu": 1, "cuda": 16}
"""Utterances a batch, by device: the CPU would only compute padding, a GPU waits to be given more.
The features are the same to rounding."""


def keep_features(
    context: Context, recognizer: Recognizer, speech: Speech, dtype: FeatureType
) -> tuple[FeatureFile, float]:
    """The features of a selection, and the seconds that computing them took.

    They are computed if they aren't there, by all ranks together, each utterance as if it were by
    itself; on a GPU in batches of similar length. Whoever finds another process at it waits for
    that one's file.

    Raises:
        DataError: no room on the disk, or features that aren't finite.
    """
    encoder = recognizer.encoder
    assert isinstance(encoder, Encoder)
    frames = [encoder.frames(samples) for samples in speech.lengths(range(len(speech)))]
    name = f"{_key(context, encoder, speech)}.{dtype}"
    kept = FeatureFile(context.work.features / name, frames, encoder.config.width, dtype)
    ranks, seconds = context.ranks, 0.0
    with ExitStack() as held:
        due = False
        problem: W2vrepError | OSError | None = None
        if ranks.main:
            try:
                held.enter_context(
                    kept.lock(lambda: context.say("another process computes the features: waiting"))
                )
                due = not kept.whole
                if due:
                    kept.begin()
            except (W2vrepError, OSError) as error:
                problem = error
        due, problem = ranks.gather((due, problem))[0]
        if problem is not None:
            raise problem
        if due:
            started = time.monotonic()
            try:
                _encode(context, recognizer, speech, kept)
            except (W2vrepError, OSError) as error:
                problem = error
            if problems := [found for found in ranks.gather(problem) if found is not None]:
                kept.drop()
                raise problems[0]
            seconds = time.monotonic() - started
            if ranks.main:
                kept.publish()
                folder = context.work.features
                total = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
                context.say(
                    f"features kept: {kept.path} ({kept.size / 1e6:.1f} MB); the folder holds "
                    f"{total / 1e6:.1f} MB and may be deleted when nothing trains"
                )
        ranks.barrier()
    return kept, seconds


@torch.no_grad()
def _encode(context: Context, recognizer: Recognizer, speech: Speech, kept: FeatureFile) -> None:
    """This rank's utterances into the partial file."""
    recognizer.eval()
    with tqdm(
        total=round(speech.seconds),
        desc="encoding",
        unit="s",
        disable=None if context.ranks.main else True,
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        device, size = context.ranks.device, TOGETHER[context.ranks.device.type]
        order = sorted(range(len(speech)), key=speech.cropped.tolist().__getitem__)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for _, positions in context.ranks.mine(batches):
            batch = speech.collate(positions).pinned(device)
            with autocast(context):
                features, frames = recognizer.encode(
                    batch.waveform.to(device, non_blocking=True), batch.lengths
                )
            rows = zip(positions, features.cpu(), frames.tolist(), strict=True)
            for position, row, count in rows:
                kept.write(position, row[:count])
            bar.update(context.ranks.world * batch.seconds)


def _key(context: Context, encoder: Encoder, speech: Speech) -> str:
    """Of everything that decides the features: weights, shape, utterances, arithmetic."""
    digest = hashlib.sha256()
    about = {
        "format": FORMAT,
        "encoder": encoder.config.to_huggingface(),
        "normalized": encoder.config.normalized,
        "manifest": context.manifest.sha256,
        "utterances": list(speech.ids),
        "precision": context.recipe.compute.precision,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

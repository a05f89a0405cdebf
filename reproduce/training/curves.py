"""TensorBoard's event files beside metrics.csv, where the extra ``tensorboard`` is installed.

They hold what metrics.csv holds: made anew from it when a run goes on, and a row longer with each
row of it. Train and validation are two runs with the same tags, so that TensorBoard draws them over
one another; the folder above them has the hyperparameters and the outcome.
"""

from __future__ import annotations

import csv
import datetime
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reproduce.records import RunRecord

NOT_DRAWN = ("update", "split", "wall_seconds")
"""Columns that are an axis, or which curve it is."""


def available() -> bool:
    """Whether tensorboard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class Curves:
    """The event files of one run: ``train/``, ``valid/`` and the session's own.

    Args:
        folder: theirs; made when the first is written.
        record: whose settings are the hyperparameters. Times are its start plus a row's active
            seconds, so that files made anew are the same.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        began = record.started or "1970-01-01T00:00:00+00:00"
        self.started = datetime.datetime.fromisoformat(began).timestamp()
        self.name = f"events.out.tfevents.{self.started:.0f}.w2vrep"

    def restart(self, metrics: Path) -> None:
        """Make the curves anew from the rows of a metrics.csv."""
        for old in self.folder.glob("**/events.out.tfevents.*"):
            old.unlink()
        with metrics.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                self.append(row)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, as metrics.csv has it: empty cells are no points."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name not in NOT_DRAWN and value not in ("", None)
        ]
        seconds = self.started + float(row.get("wall_seconds") or 0.0)
        self._write(self.folder / str(row["split"]), seconds, int(row["update"]), values, "ab")

    def session(self, record: RunRecord) -> None:
        """Write the hyperparameters and, of a run that has ended, how."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
        from tensorboard.plugins.hparams.metadata import (
            SESSION_END_INFO_TAG,
            create_summary_metadata,
        )
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        known: dict[str, Any] = {
            "arm": record.arm,
            "seed": record.seed,
            **dict(_flat(record.settings)),
        }
        if record.status != "running":
            known |= {"status": record.status, "outcome": record.outcome}
        name = f"{record.arm} seed {record.seed}"
        values = [*hparams_pb(known, trial_id=name, start_time_secs=self.started).value]
        if record.status in ("finished", "failed"):
            good = record.status == "finished" and record.outcome == "ok"
            end = SessionEndInfo(
                status=STATUS_SUCCESS if good else STATUS_FAILURE,
                end_time_secs=self.started + record.wall_seconds,
            )
            about = create_summary_metadata(HParamsPluginData(session_end_info=end))
            values.append(Summary.Value(tag=SESSION_END_INFO_TAG, metadata=about))
        self._write(self.folder, self.started, 0, values, "wb")

    def _write(self, folder: Path, time: float, step: int, values: list[Any], mode: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.name).open(mode) as file:
            writer = RecordWriter(file)
            if not file.tell():
                version = Event(wall_time=self.started, file_version="brain.Event:2")
                writer.write(version.SerializeToString())
            event = Event(wall_time=time, step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
            writer.flush()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; what TensorBoard doesn't know as a value is JSON."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else json.dumps(value)

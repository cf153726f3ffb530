"""Reads the files that loggers write, by other means than the loggers'."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 32768, 7, 7
_FULL, _LAST = 1, 4


@dataclass
class WandbRun:
    """The content of a run that W&B wrote offline.

    Attributes:
        config: The hyper-parameters.
        history: The logged rows.
        summary: The last value of each key.
        metrics: The definition of each metric by its name.
        artifacts: The logged artifacts.
    """

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    def sections(self) -> dict[str, set[str]]:
        """The panels that W&B makes by itself: by the part of a key before its first slash."""
        sections: dict[str, set[str]] = {}
        for key in {key for row in self.history for key in row if not key.startswith("_")}:
            defined = self.metrics.get(key)
            if defined is None or not defined.options.hidden:
                sections.setdefault(key.partition("/")[0], set()).add(key)
        return sections

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of the table last logged under a key, or of the one of a chart."""
        content = json.loads(self.logged_file(f"{key}.table.json").read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def logged_file(self, path: str) -> Path:
        """The last file in an artifact that has a path."""
        artifacts = reversed(self.artifacts)
        files = (file for artifact in artifacts for file in artifact.manifest.contents)
        return Path(next(file.local_path for file in files if file.path == path))


def read_wandb(folder: Path) -> WandbRun:
    """Reads the only run below a folder."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    (path,) = folder.rglob("run-*.wandb")
    run = WandbRun()
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            for item in config.update:
                _put(run.config, item)
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                _put(row, item)
            run.history.append(row)
        elif kind == "summary":
            for item in record.summary.update:
                _put(run.summary, item)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact)
    return run


def _put(values: dict[str, Any], item: Any) -> None:
    *parents, last = list(item.nested_key) or [item.key]
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = json.loads(item.value_json)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, whose blocks may cut a record into pieces."""
    position, pieces = _FILE_HEADER, b""
    while position + _HEADER <= len(content):
        rest = _BLOCK - position % _BLOCK
        if rest < _HEADER:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER
        pieces += content[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield pieces
            pieces = b""

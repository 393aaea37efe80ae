"""Reading back what TensorBoard and Weights & Biases keep."""

import json
import struct
import time
from pathlib import Path


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def histograms(folder):
    """Events with histograms, by name, as they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"histograms": 0}
    found = EventAccumulator(str(folder), size_guidance=guidance).Reload()
    return {name: found.Histograms(name) for name in found.Tags()["histograms"]}


def records(path):
    """The records of a .wandb file: LevelDB's log format behind seven bytes."""
    data, block, where, record = path.read_bytes(), 32768, 7, b""
    assert data.startswith(b":W&B")
    while where + 7 <= len(data):
        if block - where % block < 7:
            where += block - where % block  # a header does not cross blocks
            continue
        _, length, kind = struct.unpack("<IHB", data[where : where + 7])
        record += data[where + 7 : where + 7 + length]
        where += 7 + length
        if where > len(data):
            return  # still being written
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(folder, timeout=30.0):
    """Rows of an offline run, from the file that `wandb sync` would send.

    A process of wandb's own writes it, and may go on after `run.finish()`: the last
    record says that the run has ended.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    found, deadline = [], time.monotonic() + timeout
    while not any(record.WhichOneof("record_type") == "exit" for record in found):
        assert time.monotonic() < deadline, f"{path} has no end: {len(found)} records"
        time.sleep(0.02)
        found = [Record.FromString(record) for record in records(path)]
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            row = nested(record.history.item)
            rows.append({k: v for k, v in row.items() if not k.startswith("_")})
    return rows


def nested(items):
    """A row from its items, which have either a key or the keys on the way to it."""
    row = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inside = row
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = json.loads(item.value_json)
    return row

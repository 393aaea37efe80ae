"""Records survive interruptions, torn lines and several writers."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from examples.common import records

ROOT = Path(__file__).resolve().parents[2]


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "file.jsonl"
    assert records.read(path) == []
    wanted = [{"a": 1, "b": [0.1, "é"]}, {"a": 2}]
    for record in wanted:
        records.append(path, record)
    assert records.read(path) == wanted
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_spoils_only_itself(tmp_path, cut):
    path = tmp_path / "file.jsonl"
    records.append(path, {"run": 1})
    records.append(path, {"run": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    # Cut by the newline alone, the record is whole.
    kept = [{"run": 1}, {"run": 2}] if cut == 1 else [{"run": 1}]
    assert records.read(path) == kept
    records.append(path, {"run": 3})
    assert records.read(path) == [*kept, {"run": 3}]


def test_lines_that_are_no_records_are_left_out(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'\n17\n\xff\xfe\n{"run": 1}\nnull\n')
    assert records.read(path) == [{"run": 1}]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_does_not_have_is_refused_and_nothing_written(tmp_path, value):
    path = tmp_path / "file.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        records.append(path, {"x": value})
    assert not path.exists()


def test_several_processes_append_at_once(tmp_path):
    path = tmp_path / "file.jsonl"
    code = (
        "import sys; from pathlib import Path; from examples.common import records\n"
        "for i in range(40): records.append(Path(sys.argv[1]), "
        "{'writer': int(sys.argv[2]), 'i': i, 'text': 'x' * 3000})"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(w)], cwd=ROOT)
        for w in range(3)
    ]
    assert [w.wait(timeout=60) for w in writers] == [0, 0, 0]
    found = {(r["writer"], r["i"]) for r in records.read(path)}
    assert found == {(w, i) for w in range(3) for i in range(40)}

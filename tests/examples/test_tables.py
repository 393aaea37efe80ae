"""Tables on narrow terminals."""

import pytest

from examples.common.tables import aligned, fitted, terminal_width

HEAD = ["η/S", "S", "λ_max", "by differences .1", "val. acc.", "flow"]
LINES = [
    ["0.001", "16", "29.9 ± 4.4", "79.6 ± 7.6", "0.812 ± 0.002", ""],
    ["0.001", "64", "9 ± 4", "79 ± 7", "0.8 ± 0.1", "23 ± 1"],
    ["0.01", "16", "24.2 ± 2.6", "74.4 ± 4.6", "0.81 ± 0.004", ""],
]
TABLE = "Means over seeds\n" + aligned(HEAD, LINES) + "\n2 of η/S 0.01: diverged"


def cells(text):
    """Lines of cells of each part of a table."""
    parts = [part.splitlines() for part in text.split("\n\n")]
    return [[" ".join(line.split()) for line in part] for part in parts]


@pytest.mark.parametrize("width", [None, len(aligned(HEAD, LINES).split("\n")[0]), 200])
def test_wide_enough(width):
    assert fitted(TABLE, width) == TABLE


@pytest.mark.parametrize("width", range(30, 72))
def test_every_cell_is_there_with_what_names_its_line(width):
    found = fitted(TABLE, width)
    assert max(map(len, found.splitlines())) <= width
    title, *middle, _ = found.splitlines()
    assert title == "Means over seeds"
    for number, line in enumerate(LINES):
        parts = [part[number + 1] for part in cells("\n".join(middle))]
        named = f"{line[0]} {line[1]}"
        assert all(part.startswith(named) for part in parts)
        rest = " ".join(part.removeprefix(named).strip() for part in parts)
        assert rest.split() == " ".join(line[2:]).split()


def test_a_column_wider_than_the_terminal_stands_alone():
    found = fitted(aligned(["a", "b", "c"], [["1", "x" * 30, "2"]]), 10)
    assert cells(found) == [["a b", "1 " + "x" * 30], ["a c", "1 2"]]


def test_text_is_wrapped():
    assert fitted("one two three four", 9) == "one two\nthree\nfour"


def test_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal_width() == 77
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("sys.stdout", open(__file__))  # noqa: PTH123, SIM115
    assert terminal_width() is None

"""The figure in a notebook: what reaches the cell, through IPython itself."""

import sys

import pytest
from matplotlib.figure import Figure

import fastminima as fm
from fastminima.monitor import live

PNG = "iVBORw0KGgo"  # the first bytes of the format, in base 64


def row(step, **more):
    return {"step": step, "loss": 2.0 - 0.1 * step, "is_finite": True, **more}


@pytest.fixture
def cell():
    """The outputs of a cell of a real shell."""
    pytest.importorskip("IPython", reason="IPython is not installed")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    InteractiveShell.instance()
    with capture_output() as captured:
        yield captured
    InteractiveShell.clear_instance()


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    return clock


def test_one_image_that_is_drawn_again(cell, clock):
    with fm.monitor.Monitor(fm.monitor.LiveFigure(seconds=2.0)) as monitor:
        (figure,) = monitor._loggers
        for step in range(8):
            figure.write(row(step))
            clock.now += 0.5
        assert len(cell.outputs) == 2  # at 0 and 2 seconds
        clock.now += 10
    assert len(cell.outputs) == 3  # once more when it is closed
    figure.close()
    assert len(cell.outputs) == 3
    first, *again = cell.outputs
    assert not first.update
    assert all(output.update for output in again)
    assert len({output.transient["display_id"] for output in cell.outputs}) == 1
    images = [output.data["image/png"] for output in cell.outputs]
    assert all(image.startswith(PNG) for image in images)
    assert len(set(images)) == 3


def test_drawing_takes_a_twentieth_of_the_time(cell, clock, monkeypatch):
    drawn = []

    def slow(rows, columns):
        drawn.append(len(rows))
        clock.now += 1.0
        return Figure()

    monkeypatch.setattr(live, "plot", slow)
    figure = fm.monitor.LiveFigure(seconds=0.0)
    for step in range(41):
        figure.write(row(step))
        clock.now += 1.0
    assert drawn == [1, 20, 39]


def test_nothing_to_draw_yet(cell, clock):
    figure = fm.monitor.LiveFigure(seconds=0.0, columns=["accuracy"])
    figure.write({"step": 0, "is_finite": True})
    assert not cell.outputs
    figure.write(row(1))  # the column is not there yet
    clock.now += 1.0
    figure.write(row(2, accuracy=0.5))
    assert len(cell.outputs) == 2


def test_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ImportError, match=r"pip install 'fastminima\[notebook\]'"):
        fm.monitor.LiveFigure()
    with pytest.raises(ValueError, match="seconds must not be negative, got -1"):
        fm.monitor.LiveFigure(-1)

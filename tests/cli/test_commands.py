"""`report`, `tail`, `audit`, `doctor`, `completion`: what they print and return."""

import json
import sys

import pytest
from watched_run import write_run

import fastminima as fm
from fastminima.cli import main

USER = '''
import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Off(torch.autograd.Function):
    """x * w, whose gradient to w is wrong by a half."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, 1.5 * (g * x).sum(0)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return Off.apply(x, self.w)


class Once(torch.autograd.Function):
    """x ** 2, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Squared(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def made(*layers, loss=None):
    print("a word on stdout")
    torch.manual_seed(0)
    batch = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    return nn.Sequential(*layers), loss or losses, batch


def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean(model, batch):
    return losses(model, batch).mean()


def plain():
    return made(nn.Linear(4, 3))


def closure():
    model, loss, batch = plain()
    return model, lambda: loss(model, batch)


def scalar():
    return made(nn.Linear(4, 3), loss=mean)


def batchnorm():
    return made(nn.Linear(4, 3), nn.BatchNorm1d(3))


def shared():
    one = nn.Linear(4, 4)
    return made(one, nn.Tanh(), one, nn.Linear(4, 3))


def own():
    return made(nn.Linear(4, 3), Scaled())


def once():
    return made(nn.Linear(4, 3), Squared())


def half():
    model, loss, (x, y) = plain()
    return model.bfloat16(), loss, (x.bfloat16(), y)


def frozen():
    model, loss, batch = made(nn.Linear(4, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    return model, loss, batch


def no_graph():
    return made(nn.Linear(4, 3), loss=lambda model, b: losses(model, b).detach())


def number():
    return 3


def asking(seed):
    return plain()


def forgetting():
    return nn.Linear(4, 3), losses


def broken():
    raise KeyError("mine")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    folder_rows = write_run(folder, 45, resumed=30, back=5)
    assert len(folder_rows) == 45
    return folder


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "train.py"
    path.write_text(USER)
    yield lambda name: f"{path}:{name}"
    sys.modules.pop("train", None)


def printed(capsys, *words, code=0):
    assert main(list(words)) == code
    return capsys.readouterr().out


def as_json(capsys, *words, code=0):
    return json.loads(printed(capsys, *words, "--json", code=code))


def test_the_machine_as_json(capsys):
    found = as_json(capsys)
    assert {"fastminima", "torch", "threads", "native", "ops"} <= found.keys()
    assert {"op", "device", "runs", "others"} == found["ops"][0].keys()


def test_report(capsys, folder, tmp_path):
    pytest.importorskip("plotly")
    text = printed(capsys, "report", str(folder))
    assert text.startswith(str(folder / "report.html"))
    output = tmp_path / "deep" / "page.html"
    found = as_json(capsys, "report", str(folder), "--output", str(output))
    assert found["output"] == str(output) and output.exists()
    assert (found["rows"], found["spikes"]) == (45, 3)
    # Before the command the word means the same.
    words = ("--json", "report", str(folder))
    assert json.loads(printed(capsys, *words))["last_step"] == 39


def test_tail(capsys, folder):
    pytest.importorskip("rich")
    text = printed(capsys, "tail", str(folder), "--once", "--rows", "7")
    lines = text.splitlines()
    assert lines[0].split()[0] == "step"
    assert [int(line.split()[0]) for line in lines[1:8]] == list(range(33, 40))
    assert "noise scale" in lines[9] and "no upper end" in lines[9]
    assert "sharpness" in lines[10] and "█" in lines[10]
    assert sum(line.startswith("spike at step") for line in lines) == 3


def test_tail_as_json(capsys, folder):
    found = as_json(capsys, "tail", str(folder), "--once", "--rows", "3")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()][-3:]
    for shown, row in zip(found["last_rows"], rows, strict=True):
        assert {name: shown.get(name) for name in row} == pytest.approx(row)


def test_tail_follows_a_run(folder, tmp_path, monkeypatch, capsys):
    """A row a line, as they come."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n')
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.write(json.dumps({"step": len(naps) + 1, "loss": None}) + "\n")

    monkeypatch.setattr("time.sleep", nap)
    text = printed(capsys, "tail", str(path), "--json", "--rows", "1", "--every", "9")
    found = [json.loads(line) for line in text.splitlines()]
    assert found == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": None},
    ]
    assert naps == [9, 9, 9]


def test_audit(capsys, user):
    for name in ("plain", "closure", "shared"):
        found = as_json(capsys, "audit", user(name))
        assert found["ok"] and found["gradients"]["ok"] and found["curvature"]["ok"]
    names = {row["parameter"] for row in found["gradients"]["rows"]}
    assert names == {"0.bias", "0.weight", "3.bias", "3.weight"}
    text = printed(capsys, "audit", user("plain"))
    assert "all agree" in text and "nothing wrong" in text
    assert "a word on stdout" not in text


def test_audit_says_what_is_refused(capsys, user):
    found = as_json(capsys, "audit", user("batchnorm"), code=1)
    assert "normalisation" in found["gradients"]["refused"]
    assert found["curvature"]["ok"]
    words = ("audit", user("batchnorm"), "--batchnorm", "rows", "--only", "gradients")
    assert as_json(capsys, *words)["ok"]
    scalar = as_json(capsys, "audit", user("scalar"), code=1)
    assert "reduction='none'" in scalar["gradients"]["refused"]
    assert as_json(capsys, "audit", user("scalar"), "--only", "curvature")["ok"]


def test_audit_finds_a_wrong_derivative(capsys, user):
    """The gradient is not that of the loss, which differences show."""
    found = as_json(capsys, "audit", user("own"), code=1)
    wrong = [c["name"] for c in found["curvature"]["checks"] if c["verdict"] == "WRONG"]
    assert wrong


@pytest.mark.parametrize(
    ("name", "subject", "verdict", "said"),
    [
        ("plain", "per-sample gradients", "ok", "AddmmBackward0 2"),
        ("plain", "curvature", "ok", "a product works"),
        ("scalar", "loss", "note", "a scalar"),
        ("batchnorm", "batch normalisation", "refused", "in training mode: 1"),
        ("shared", "shared parameters", "note", "0.weight"),
        ("own", "functions of your own", "note", "OffBackward"),
        ("own", "rules", "slow", "1.w"),
        ("once", "curvature", "refused", "OnceBackward"),
        ("half", "dtype", "note", "2 bfloat16"),
        ("frozen", "frozen", "note", "2 parameters"),
        ("no_graph", "loss", "refused", "no graph"),
    ],
)
def test_doctor(capsys, user, name, subject, verdict, said):
    refused = name in ("batchnorm", "once", "no_graph")
    found = as_json(capsys, "doctor", user(name), code=int(refused))
    assert found["ok"] is not refused
    (one,) = [f for f in found["findings"] if f["subject"] == subject]
    assert one["verdict"] == verdict
    assert said in one["what"] + one["why"]
    order = ["refused", "slow", "note", "ok"]
    places = [order.index(f["verdict"]) for f in found["findings"]]
    assert places == sorted(places)


def test_doctor_in_words(capsys, user):
    text = printed(capsys, "doctor", user("batchnorm"), code=1)
    assert text.startswith("refused  batch normalisation: in training mode: 1")
    assert "-> batchnorm=" in text
    assert text.rstrip().endswith("1 refused, 0 slow")
    told = as_json(capsys, "doctor", user("batchnorm"), "--batchnorm", "rows")
    assert told["ok"]


def test_doctor_changes_nothing(capsys, user, monkeypatch):
    """No gradient is left, and no parameter moves."""
    from fastminima.cli import doctor
    from fastminima.cli.target import load_target

    target = load_target(user("shared"))
    before = [p.clone() for p in target.model.parameters()]
    doctor.examine(target)
    for old, parameter in zip(before, target.model.parameters(), strict=True):
        assert parameter.grad is None and parameter.equal(old)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "no/such"], "There is no run at 'no/such'"),
        (["report", ".", "--serve", "--output", "x"], "takes no --output"),
        (["report", "{folder}", "--serve", "--port", "99999"], "from 0 to 65535"),
        (["report", "{strange}"], "None of 2 lines at"),
        (["tail", "{strange}", "--once"], "None of 2 lines at"),
        (["report", __file__], "a file of rows ends in '.jsonl'"),
        (["audit", "{}shared", "--samples", "0"], "--samples must be at least 1"),
        (["audit", "{}asking"], "asking takes arguments"),
        (["doctor", "{}forgetting"], "Return the batch too"),
        (["tail", ".", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["audit", "train"], "'train' names no function"),
        (["audit", "no_such_module:f"], "no module 'no_such_module'"),
        (["doctor", "no_such.py:f"], "no file 'no_such.py'"),
        (["doctor", "{}nothing"], "has no function 'nothing'; it has"),
        (["doctor", "{}number"], "returned int. It must return (model, loss, batch)"),
    ],
)
def test_what_is_wrong_with_a_command(capsys, user, folder, tmp_path, words, said):
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"loss": 1.0}\nno JSON\n')
    places = {"folder": folder, "strange": strange}
    assert main([word.format(user(""), **places) for word in words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and said in told.err
    assert told.out == "" and "Traceback" not in told.err


def test_errors_of_the_users_own_code_keep_their_traceback(user):
    with pytest.raises(KeyError, match="mine"):
        main(["doctor", user("broken")])


def test_completion(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish"):
        text = printed(capsys, "completion", shell)
        assert "doctor" in text and "batchnorm" in text


@pytest.mark.parametrize("command", ["report", "tail", "audit", "doctor"])
def test_help_fits_a_terminal(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "--json" in text and max(map(len, text.splitlines())) <= 90


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert fm.__version__ in capsys.readouterr().out


def test_lines_that_were_not_read_are_counted(capsys, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo\n')
    assert "(1 row, 0 spikes; not read: 1 lines)" in printed(
        capsys, "report", str(path)
    )


@pytest.mark.parametrize(
    ("words", "package"),
    [(["tail", "{}", "--once"], "rich.console"), (["completion", "bash"], "shtab")],
)
def test_without_the_extra(capsys, folder, monkeypatch, words, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([word.format(folder) for word in words]) == 2
    assert "pip install 'fastminima[cli]'" in capsys.readouterr().err

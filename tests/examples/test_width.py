"""The experiment end to end: measured values, and interruptions of every kind."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastminima as fm
from examples.common import data, records
from examples.three_factors import settings, train

ROOT = Path(__file__).resolve().parents[2]

# Each run waits until the test has put down a token for it, so that it does not depend
# on how busy the machine is how many are finished when they are interrupted.
DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from examples.three_factors import settings, train, width
tokens, honest = Path({tokens!r}), train.train
def is_allowed():
    for token in tokens.iterdir():
        try:
            token.unlink()
        except FileNotFoundError:  # the other worker took it
            continue
        return True
    return False
def waiting(*arguments):
    while not is_allowed():
        time.sleep(0.01)
    return honest(*arguments)
train.train = waiting
tiny = settings.Settings(
    preset="tiny", dataset="digits", train_size=512, validation_size=100,
    hidden=(12, 12), pairs=((0.02, 8), (0.04, 16), (0.08, 8), (0.16, 16)),
    seeds=(0, 1, 2), epochs=10, rungs=(1.5, 1.0, 0.7), measure_size=128, products=4)
if __name__ == "__main__":
    sys.exit(width.run(tiny, Path(sys.argv[1]), workers=2))
"""


def tiny(**changes):
    values = {
        "preset": "tiny",
        "dataset": "digits",
        "train_size": 200,
        "validation_size": 50,
        "hidden": (10,),
        "pairs": ((0.1, 20),),
        "seeds": (0,),
        "epochs": 6,
        "rungs": (1.5, 1.0),
        "measure_size": 200,
        "products": 90,
    }
    return settings.Settings(**{**values, **changes})


def exact(model, batch):
    """tr C, lambda_max, |H|_F and tr H in float64, the slow way."""
    model = model.double()
    x, y = batch[0].double(), batch[1]
    params = dict(model.named_parameters())

    def loss(flat, x, y):
        pieces = flat.split([p.numel() for p in params.values()])
        named = {
            k: piece.view(p.shape)
            for (k, p), piece in zip(params.items(), pieces, strict=True)
        }
        scores = torch.func.functional_call(model, named, (x,))
        return torch.nn.functional.cross_entropy(scores, y)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    hessian = torch.autograd.functional.hessian(
        lambda f: loss(f, x, y), flat, vectorize=True
    )
    single = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    gradients = single(flat, x.unsqueeze(1), y.unsqueeze(1))
    return {
        "covariance_trace": gradients.var(dim=0).sum().item(),
        "lambda_max": torch.linalg.eigvalsh(hessian)[-1].item(),
        "frobenius_norm": hessian.norm().item(),
        "trace": hessian.trace().item(),
    }


def test_what_is_measured_is_what_it_says():
    chosen = tiny()
    run = chosen.runs[0]
    parts = data.split(data.load("digits"), 200, 50)
    torch.manual_seed(0)
    model = train.make_model(chosen, parts.train[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    instruments = train.Instruments(model, chosen, run, parts)
    before = [p.detach().clone() for p in model.parameters()]
    got = instruments.measure(optimizer, 0.0)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    want = exact(model, instruments.train_batch)
    assert got["covariance_trace"] == pytest.approx(want["covariance_trace"], rel=1e-4)
    assert abs(got["lambda_max"] - want["lambda_max"]) <= 2 * got["lambda_max_residual"]
    for name in ("frobenius_norm", "trace"):
        assert abs(got[name] - want[name]) < 4 * got[f"{name}_error"], name
    parameters = sum(p.numel() for p in before)
    factors = fm.ThreeFactors(
        0.1, 20, want["covariance_trace"] / parameters, dataset_size=200
    )
    assert got["temperature"] == pytest.approx(factors.temperature, rel=1e-4)
    assert got["noise_ratio"] == pytest.approx(0.1 * (1 / 20 - 1 / 200))


def test_a_run_is_measured_at_its_rungs_and_its_end_and_repeats_exactly():
    chosen = tiny(products=3)
    parts = data.split(data.load("digits"), 200, 50)
    epochs = []
    first = train.train(chosen, chosen.runs[0], parts, lambda: epochs.append(1))
    again = train.train(chosen, chosen.runs[0], parts)
    assert len(epochs) == 6
    assert first["status"] == "finished"
    losses = [m["train_loss"] for m in first["measurements"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] <= 1.5 and losses[1] <= 1.0
    assert first["measurements"][-1]["epoch"] == 6
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_a_run_that_diverges_says_so(tmp_path):
    chosen = tiny(pairs=((1e4, 20),))
    parts = data.split(data.load("digits"), 200, 50)
    record = train.train(chosen, chosen.runs[0], parts)
    assert record["status"] == "diverged"
    records.append(tmp_path / "file.jsonl", record)  # every number in it is finite


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_it_goes_on_and_loses_nothing(tmp_path):
    driver, path = tmp_path / "driver.py", tmp_path / "runs.jsonl"
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    driver.write_text(DRIVER.format(root=str(ROOT), tokens=str(tokens)))

    def allow(runs):
        for number in range(runs):
            (tokens / str(number)).touch()

    def start():
        return subprocess.Popen(
            [sys.executable, str(driver), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A suite that runs in the background hands down an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def stop(how, at_least, new=0):
        """Interrupt once that many runs are finished: code, output and records."""
        allow(new)
        process = start()
        until(lambda: len(children(process.pid)) >= 3 or process.poll() is not None)
        until(lambda: len(records.read(path)) >= at_least or process.poll() is not None)
        workers = children(process.pid)  # two, and multiprocessing's resource tracker
        how(process)
        output = process.communicate(timeout=60)[0]
        until(lambda: not any(is_running(w) for w in workers), seconds=20)
        return process.returncode, output, records.read(path)

    # Ctrl-C in a terminal goes to every process of the group; here while they start.
    code, output, _ = stop(lambda p: os.killpg(p.pid, signal.SIGINT), at_least=0)
    assert code == 130 and "Traceback" not in output, output

    interrupt = functools.partial(stop, lambda p: os.killpg(p.pid, signal.SIGINT))
    code, output, kept = interrupt(at_least=2, new=2)
    assert code == 130, output
    assert f"Interrupted: {len(kept)} of 12 runs are kept" in output
    assert "Traceback" not in output

    assert len(kept) == 2

    code, output, more = stop(lambda p: p.kill(), at_least=4, new=2)
    assert code == -signal.SIGKILL, output
    assert more[:2] == kept and len(more) == 4

    with path.open("ab") as file:  # as if power had failed in the middle of a write
        file.write(b'{"settings": "abc", "learning_r')
    allow(12)
    process = start()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"{len(more)}/12 runs" in output and "12/12 runs" in output
    done = records.read(path)
    assert done[: len(more)] == more
    keys = [(r["learning_rate"], r["batch_size"], r["seed"]) for r in done]
    assert len(keys) == len(set(keys)) == 12
    assert f"Figure:  {path.with_suffix('.png')}" in output
    assert output.strip().splitlines()[-1].startswith("The claim ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_is_said(tmp_path):
    driver, path = tmp_path / "driver.py", tmp_path / "runs.jsonl"
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    for number in range(12):
        (tokens / str(number)).touch()
    driver.write_text(DRIVER.format(root=str(ROOT), tokens=str(tokens)))
    process = subprocess.Popen(
        [sys.executable, str(driver), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: len(records.read(path)) >= 1)
    workers = [
        c
        for c in children(process.pid)
        if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()
    ]
    os.kill(workers[-1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "A worker ended with exit code -9" in output
    assert not any(is_running(w) for w in workers)


def test_command_line_without_fashion_mnist(tmp_path, monkeypatch, capsys):
    from examples.three_factors import width

    monkeypatch.setattr(data, "_roots", list)
    arguments = ["--plot-only", "--out", str(tmp_path)]
    assert width.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "Data: digits (scikit-learn), 1440 to train" in printed
    assert "Fashion-MNIST was not found" in printed
    assert "No finished runs in" in printed
    assert width.main([*arguments, "--data", "digits"]) == 1
    assert "was not found" not in capsys.readouterr().out
    with pytest.raises(data.DataNotFound, match="FASTMINIMA_DATA"):
        width.main([*arguments, "--data", "cifar10"])


def test_the_example_runs_as_a_script():
    command = [sys.executable, "examples/three_factors/width.py", "--help"]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--quickest" in shown.stdout and "FASTMINIMA_QUICK" in shown.stdout

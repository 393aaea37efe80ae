"""How setup.py looks for a CUDA compiler, with compilers that only pretend."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Speaks like nvcc, fails on the architecture 1, writes what it is asked to.
FAKE = """#!{python}
import pathlib, sys
words = sys.argv[1:]
if "--version" in words:
    print("Cuda compilation tools, release {version}, V{version}.1")
elif "-dryrun" in words:
    print('#$ INCLUDES="-I{home}/include"', '#$ LIBRARIES= "-L{home}/lib"', sep="\\n")
elif any("compute_1," in w for w in words):
    print("nvcc fatal: Unsupported gpu architecture; an error", file=sys.stderr)
    sys.exit(1)
else:
    pathlib.Path(words[words.index("-o") + 1]).write_text(" ".join(words))
"""


@pytest.fixture
def nvcc(tmp_path):
    def make(version="13.0"):
        (tmp_path / "include").mkdir(exist_ok=True)
        (tmp_path / "lib").mkdir(exist_ok=True)
        path = tmp_path / "nvcc"
        path.write_text(
            FAKE.format(python=sys.executable, version=version, home=tmp_path)
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def build_cuda(monkeypatch):
    def load(**environment):
        for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name in ("FASTMINIMA_CUDA", "FASTMINIMA_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        spec = importlib.util.spec_from_file_location("b", ROOT / "build_cuda.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_a_compiler_that_works(build_cuda, nvcc, tmp_path):
    toolkit, reason = build_cuda(NVCC=nvcc()).find()
    assert reason is None
    assert toolkit.architectures == "sm_80;sm_90a;sm_100;compute_100"
    assert toolkit.library_dirs[0] == str(tmp_path / "lib")
    target = tmp_path / "deep" / "x.o"
    toolkit.compile("x.cu", str(target))
    said = target.read_text()
    assert "-gencode=arch=compute_90a,code=sm_90a" in said
    assert "-gencode=arch=compute_100,code=compute_100" in said


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("12.4", "sm_80;sm_90a;sm_90;compute_90"),
        ("12.8", "sm_80;sm_90a;sm_100;compute_100"),
    ],
)
def test_architectures_that_a_version_knows(build_cuda, nvcc, version, architectures):
    toolkit, _ = build_cuda(NVCC=nvcc(version)).find()
    assert toolkit.architectures == architectures


def test_architectures_of_ones_own(build_cuda, nvcc):
    toolkit, _ = build_cuda(NVCC=nvcc(), FASTMINIMA_CUDA_ARCHS="75;86+PTX").find()
    assert toolkit.architectures == "sm_75;sm_86;compute_86"


@pytest.mark.parametrize(
    ("environment", "version", "said"),
    [
        ({"FASTMINIMA_CUDA": "0"}, "13.0", "FASTMINIMA_CUDA=0 at install time"),
        ({}, "11.8", "11.8, older than 12.1"),
        ({"FASTMINIMA_CUDA_ARCHS": "1"}, "13.0", "Unsupported gpu architecture"),
    ],
)
def test_the_reason_for_none(build_cuda, nvcc, environment, version, said):
    toolkit, reason = build_cuda(NVCC=nvcc(version), **environment).find()
    assert toolkit is None and said in reason and "\n" not in reason


def test_no_compiler_at_all(build_cuda, monkeypatch):
    module = build_cuda(PATH="/nonexistent")
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    assert module.find() == (None, "no nvcc")
    monkeypatch.setattr(module, "MODE", "1")
    with pytest.raises(RuntimeError, match="FASTMINIMA_CUDA=1, but no nvcc"):
        module.find()


def test_the_sources_are_in_the_source_distribution():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    assert ["graft", "csrc"] in lines
    assert any(line[:1] == ["include"] and "build_cuda.py" in line for line in lines)

"""What the emulated device notices: faults planted for it, and none in the kernels."""

import subprocess

import pytest

from tools.kernels import emulator


def build_under(flags, name, sources, folder):
    if reason := emulator.missing(flags, folder):
        pytest.skip(reason)
    return emulator.build(folder / name, sources, flags)


@pytest.fixture(scope="module")
def address_faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("address")
    source = emulator.HERE / "planted_faults.cpp"
    return build_under(emulator.ADDRESS, "faults", [source], folder)


@pytest.fixture(scope="module")
def thread_faults(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thread")
    source = emulator.HERE / "planted_faults.cpp"
    return build_under(emulator.THREAD, "faults", [source], folder)


def outcome(program, name):
    done = emulator.run(program, name, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("divergent_barrier", "divergent __syncthreads"),
        ("deadlock", "deadlock"),
        ("mask_of_absent_lanes", "exited or absent lane"),
        ("source_outside_the_mask", "not in the mask"),
        ("stale_shared", "NaN at 32"),
        ("past_the_end", "heap-buffer-overflow"),
        ("past_shared", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_a_fault_is_noticed(address_faults, fault, said):
    code, text = outcome(address_faults, fault)
    assert code != 0 and said in text, text


@pytest.mark.parametrize("fault", ["shared_race", "block_race", "missing_syncwarp"])
def test_a_race_is_noticed(thread_faults, fault):
    code, text = outcome(thread_faults, fault)
    assert code != 0 and "data race" in text, text


@pytest.mark.parametrize("name", ["sound", "sound_ticket"])
def test_nothing_is_noticed_where_nothing_is_wrong(address_faults, thread_faults, name):
    for program in (address_faults, thread_faults):
        assert outcome(program, name) == (0, "nothing noticed\n")


@pytest.mark.parametrize(
    ("flags", "cases"),
    [
        pytest.param(emulator.ADDRESS, "all", id="address"),
        pytest.param([*emulator.THREAD, "-DFM_THREADS=64"], "few", id="thread"),
    ],
)
def test_the_kernels_pass(flags, cases, tmp_path):
    sources = [*emulator.KERNELS, emulator.HERE / "sanitized.cpp"]
    program = build_under(flags, "sanitized", sources, tmp_path)
    try:
        done = emulator.run(program, cases)
    except subprocess.CalledProcessError as error:
        pytest.fail((error.stdout + error.stderr)[:3000])
    assert done.stdout == "done\n"

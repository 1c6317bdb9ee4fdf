"""The shell side of the project: set-up checks, the counting line, launchers, pins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers.shell import beside_python, executable, only

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = REPOSITORY / ".ci" / "count"


def shell(
    command: list[str], path: Path | str, cwd: Path = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run with nothing but the given PATH and variables."""
    environment = {"PATH": str(path), "HOME": str(cwd), **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def checkout(root: Path) -> Path:
    """A copy of what .ci/setup reads, so that no test can touch the real .venv."""
    for name in ("pyproject.toml", "docker/pins.env", ".ci/setup"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return root


def write_junit(
    directory: Path, name: str, tests: int, failures: int, errors: int, skips: int
) -> None:
    numbers = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skips}"'
    (directory / f"{name}.xml").write_text(f"<testsuites><testsuite {numbers}/></testsuites>")


def count(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COUNT), str(directory)], capture_output=True, text=True, check=False
    )


def test_the_count_adds_all_suites(tmp_path: Path) -> None:
    write_junit(tmp_path, "unit", 10, 1, 2, 3)
    write_junit(tmp_path, "dist", 5, 0, 0, 1)
    done = count(tmp_path)
    assert (done.returncode, done.stdout) == (0, "8 passed, 3 failed, 4 skipped\n")
    assert (tmp_path / "counts.txt").read_text() == done.stdout


def test_no_tests_at_all_is_a_failure(tmp_path: Path) -> None:
    done = count(tmp_path)
    assert (done.returncode, done.stdout) == (1, "0 passed, 0 failed, 0 skipped\n")
    write_junit(tmp_path, "unit", 0, 0, 0, 0)
    assert count(tmp_path).returncode == 1


def test_the_count_reads_what_pytest_writes(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_pass(): pass\n"
        "def test_fail(): assert False\n"
        "def test_skip(): pytest.skip('x')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_error(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=."]
    command += ["--junitxml=unit.xml", "test_sample.py", "-p", "no:cacheprovider"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert count(tmp_path).stdout == "1 passed, 2 failed, 1 skipped\n"


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    old = 'case "$1" in --version) echo "Python 3.9.2" ;; *) exit 1 ;; esac'
    python = executable(tmp_path / "python3.9", old)
    done = shell(["bash", ".ci/setup"], os.environ["PATH"], root, PYTHON=str(python))
    assert done.returncode == 1
    assert "setup: Python 3.9.2 is too old; Python >= 3.11 is needed" in done.stderr
    assert not (root / ".venv").exists()


def test_setup_refuses_a_machine_without_python(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    done = shell(["bash", ".ci/setup"], only(tmp_path / "bin", "bash", "dirname"), root)
    assert done.returncode == 1 and "no python3 found; Python >= 3.11 is needed" in done.stderr


def test_setup_refuses_a_machine_without_a_compiler(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    tools = only(tmp_path / "bin", "bash", "dirname", "sed")
    done = shell(["bash", ".ci/setup"], tools, root, PYTHON=sys.executable)
    assert done.returncode == 1
    assert "setup: no C compiler (cc, gcc or clang)" in done.stderr
    assert not (root / ".venv").exists()


@pytest.mark.parametrize(
    ("tool", "index"),
    [("", ""), ("nvidia-smi", ""), ("rocminfo", "https://download.pytorch.org/whl/rocm")],
)
def test_setup_names_an_index_for_rocm_alone_and_pins_torch(
    tmp_path: Path, tool: str, index: str
) -> None:
    if Path("/opt/rocm").exists() and tool != "rocminfo":
        pytest.skip("this machine has ROCm")
    root = checkout(tmp_path / "checkout")
    tools = only(tmp_path / "bin", "bash", "dirname", "sed", "cat")
    executable(tools / "cc", "exit 0")
    if tool:
        executable(tools / tool, "exit 0")
    # A Python that notes what it is asked to do, in place of .venv's.
    log = tmp_path / "calls"
    executable(root / ".venv" / "bin" / "python", f'echo "$*" >> {log}; cat > {os.devnull}')
    done = shell(["bash", ".ci/setup"], tools, root, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    pip = [line for line in log.read_text().splitlines() if line.startswith("-m pip install")]
    assert len(pip) == 2 and pip[0].endswith("torch==2.13.0")
    assert ("--index-url" in pip[0]) == bool(index) and index in pip[0]
    # torch for ROCm brings triton-rocm, which the extra would overwrite.
    extras = "dev,docs,triton" if tool == "" else "dev,docs"
    assert pip[1] == f"-m pip install --editable .[{extras}]"


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "docker/pins.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def dockerfiles() -> dict[str, str]:
    return {p.name: p.read_text() for p in (REPOSITORY / "docker").glob("*.Dockerfile")}


def test_images_use_the_pins() -> None:
    assert set(dockerfiles()) == {"cpu.Dockerfile", "rocm.Dockerfile"}
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", "\n".join(dockerfiles().values()), re.M))
    own = {"EXTRAS"}
    assert defaults.keys() - own == {name for name in pins() if not name.endswith("TORCH_INDEX")}
    assert all(defaults[name] == pins()[name] for name in defaults.keys() - own)
    explained = (REPOSITORY / "docker/pins.md").read_text()
    assert all(f"`{name}`" in explained for name in pins())
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"torch {torch_pin(dependencies['dependencies'])} for ROCm" in explained
    # The same release on both makers' devices.
    te = f"transformer-engine[pytorch]=={pins()['TE_VERSION']}"
    assert dependencies["optional-dependencies"]["te"] == [te]


def base_images(dockerfile: str) -> list[str]:
    """Images that stages start from, earlier stages aside, variables replaced by their defaults."""
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.M))
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.M)
    names = {name for _, name in stages if name}
    images = [re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], image) for image, _ in stages]
    return [image for image in images if image not in names]


def floating(image: str) -> bool:
    """Whether the tag, if there is one, may mean another image tomorrow: it names no version of two
    parts at least."""
    return not re.search(r":[^:/]*\d+\.\d+", image)


def test_images_start_from_full_versions() -> None:
    for text in dockerfiles().values():
        images = base_images(text)
        assert images and not any(floating(image) for image in images), images
    for image in ("ubuntu", "ubuntu:latest", "python:3", "rocm/pytorch:latest", "host:80/x"):
        assert floating(image)
    stages = "ARG A=x:1.2\nFROM ${A} AS one\nFROM one\nFROM y"
    assert base_images(stages) == ["x:1.2", "y"]


def test_dockerfiles_pass_hadolint(tmp_path: Path) -> None:
    hadolint = beside_python("hadolint")
    paths = [str(path) for path in (REPOSITORY / "docker").glob("*.Dockerfile")]
    done = subprocess.run([hadolint, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN apt-get install git\n")
    planted = subprocess.run([hadolint, str(tmp_path / "Dockerfile")], capture_output=True)
    assert planted.returncode != 0


def torch_pin(dependencies: list[str]) -> str:
    (pin,) = [entry.removeprefix("torch==") for entry in dependencies if entry.startswith("torch=")]
    return pin


def test_torchrun_launcher_hands_its_arguments_on(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    executable(tmp_path / ".venv" / "bin" / "python", 'printf "%s|" "$@"')
    script = str(tmp_path / "launch" / "torchrun.sh")
    path = os.environ["PATH"]
    one = shell([script, "a=b c"], path, tmp_path, NPROC_PER_NODE="2")
    begin = "-m|torch.distributed.run|--standalone|--nproc-per-node|2|--no-python|bash|-c|"
    assert one.stdout.startswith(begin)
    assert one.stdout.endswith(f"{tmp_path}/.venv/bin/python|-m|zaya_train|train|a=b c|")
    several = shell([script, "preflight"], path, tmp_path, NNODES="4", RDZV_ENDPOINT="node0:29400")
    assert "--nnodes|4|--rdzv-backend|c10d|--rdzv-endpoint|node0:29400|" in several.stdout
    assert several.stdout.endswith("-m|zaya_train|preflight|")
    lost = shell([script], path, tmp_path, NNODES="4")
    assert lost.returncode != 0 and "RDZV_ENDPOINT=host:port must name" in lost.stderr


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        ("exit 0", ""),
        (
            "echo 'E: no network' >&2; exit 100",
            "could not be installed, its tests skip: E: no net",
        ),
    ],
)
def test_ci_goes_on_whatever_apt_does(tmp_path: Path, apt: str, said: str) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = only(tmp_path / "bin", "bash", "dirname", "mkdir", "tail", "timeout")
    executable(tools / "id", "echo 0")
    executable(tools / "apt-get", apt)
    executable(tools / "make", "echo '7 passed, 0 failed, 0 skipped'")
    done = shell(["bash", ".ci/run"], tools, tmp_path)
    assert done.returncode == 0 and said in done.stdout
    assert ("strace could not be installed" in done.stdout) == bool(said)
    assert done.stdout.splitlines()[-1] == "7 passed, 0 failed, 0 skipped"
    # A failing run says the count last, and fails.
    executable(tools / "make", "exit 2")
    done = shell(["bash", ".ci/run"], tools, tmp_path)
    assert done.returncode == 2 and done.stdout.splitlines()[-1].startswith("0 passed")


def test_ci_without_root_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = only(tmp_path / "bin", "bash", "dirname", "mkdir", "tail", "timeout")
    executable(tools / "id", "echo 1000")
    executable(tools / "apt-get", "touch called")
    executable(tools / "make", "exit 0")
    done = shell(["bash", ".ci/run"], tools, tmp_path)
    assert done.returncode == 0 and "no root or no apt-get" in done.stdout
    assert not (tmp_path / "called").exists()

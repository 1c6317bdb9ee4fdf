"""The wheel works outside the checkout, configurations included."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents in an empty directory, as pip would lay them out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(folder), str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("zaya_train-*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run_installed(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with the unpacked wheel first on the path, started outside the checkout."""
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); "
        "import zaya_train.main as m; print(m.__file__); sys.exit(m.main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=site.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_brings_packages_and_configs_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"zaya_train", "zaya_kernels"}
    shipped = installed / "zaya_train" / "_configs"
    ours = {p.relative_to(REPOSITORY / "configs") for p in REPOSITORY.glob("configs/**/*.yaml")}
    assert {p.relative_to(shipped) for p in shipped.rglob("*.yaml")} == ours and len(ours) > 10


def test_the_wheel_brings_the_report_page_and_the_licence_of_its_library(installed: Path) -> None:
    ours = REPOSITORY / "zaya_train" / "tools" / "report_page"
    shipped = installed / "zaya_train" / "tools" / "report_page"
    names = {path.name for path in ours.iterdir()}
    assert {path.name for path in shipped.iterdir()} == names and len(names) == 6
    (licence,) = installed.glob("*.dist-info/licenses/zaya_train/tools/report_page/LICENSE-uPlot")
    assert "Permission is hereby granted" in licence.read_text()


def test_an_installed_wheel_plans_a_recipe(installed: Path) -> None:
    result = run_installed(installed, "plan", "recipe=zaya1_8b", "--ranks", "1024")
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout.splitlines()[0]
    assert "8,840,488,784 parameters" in result.stdout


def test_an_installed_wheel_composes_train(installed: Path) -> None:
    result = run_installed(installed, "train", "recipe=smoke_cpu", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "pretrain_1" in result.stdout

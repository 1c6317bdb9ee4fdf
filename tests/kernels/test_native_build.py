"""How the library in C comes to be, and what is said where it cannot."""

from __future__ import annotations

import platform
import pwd
import shutil
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
from zaya_kernels.native import library

from zaya_train.config.errors import ConfigError

from . import test_native, test_native_router


def one_function(folder: Path) -> Path:
    """Sources that compile at once."""
    folder.mkdir()
    (folder / "one.c").write_text("int one(void) { return 1; }")
    return folder


def test_options_of_the_compiler_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -DONE='a b'")
    found, *options = library.compiler()
    assert found.endswith("/cc")
    assert options == ["-DONE=a b"]


def test_a_library_is_kept_for_its_compiler_and_libc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho $VERSION\n")
    compiler.chmod(0o755)
    cc = [str(compiler)]
    monkeypatch.setenv("VERSION", "1")
    paths = [library.path(cc), library.path([*cc, "-O0"])]
    monkeypatch.setenv("VERSION", "2")
    paths.append(library.path(cc))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    paths.append(library.path(cc))
    monkeypatch.setattr(library, "FLAGS", library.FLAGS[1:])
    paths.append(library.path(cc))
    assert len(set(paths)) == len(paths)


def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    sources = one_function(tmp_path / "sources")
    target = tmp_path / "native.so"
    target.write_bytes(b"")
    assert library.load(target, library.compiler(), sources).one() == 1
    whole = target.stat()
    assert library.load(target, library.compiler(), sources).one() == 1
    assert target.stat().st_ino == whole.st_ino, "compiled again without need"


def test_where_nothing_can_be_written_the_error_names_the_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make .*file/native.so: .*XDG_CACHE_HOME"):
        library.load(tmp_path / "file" / "native.so", library.compiler())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ConfigError, match="no home directory; set XDG_CACHE_HOME"):
        library.folder()


def test_a_compiler_that_makes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did not compile with true: no message"):
        library.build(tmp_path / "native.so", ["true"])


def test_of_a_compilers_messages_the_telling_one_is_shown(tmp_path: Path) -> None:
    sources = one_function(tmp_path / "sources")
    with pytest.raises(ConfigError, match=r"did not compile with cc: .*cannot find -labsent"):
        library.build(tmp_path / "native.so", ["cc", "-labsent"], sources)


OTHER_BUILDS = {
    # Without AVX-512: other vectors, tiles, and widened bf16.
    "x86-64": ("-march=x86-64", None),
    "haswell": ("-march=haswell", None),
    "clang": ("-march=native", "clang"),
    "gcc-11": ("-march=native", "gcc-11"),  # its vectors' shuffles have another name
}


@pytest.fixture(scope="module", params=OTHER_BUILDS)
def other_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CDLL:
    """The library as another processor or compiler has it."""
    march, compiler = OTHER_BUILDS[request.param]
    if march != "-march=native" and platform.machine() != "x86_64":
        pytest.skip(f"no x86-64 processor but {platform.machine()}")
    features = Path("/proc/cpuinfo").read_text().split()
    if request.param == "haswell" and not {"avx2", "fma", "bmi2"} <= set(features):
        pytest.skip("a processor without AVX2")
    found = shutil.which(compiler) if compiler else None
    if compiler and not found:
        pytest.skip(f"{compiler} is not in PATH")
    target = tmp_path_factory.mktemp("other_build") / "native.so"
    flags = [march if x == "-march=native" else x for x in library.FLAGS]
    library.build(target, [found] if found else library.compiler(), flags=flags)
    return CDLL(str(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_processors_and_compilers(
    other_build: CDLL, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_load", lambda: other_build)
    for sizes in ((37, 45, 33), (100, 70, 514)):
        for turned in ((0, 0), (1, 0), (0, 1), (1, 1)):
            test_native.test_products(sizes, turned, dtype)
    test_native.test_products_in_bf16_are_rounded_once()
    test_native.test_attention_is_as_exact_as_torch((8, 2), 64, dtype)
    test_native.test_loss_is_as_exact_as_eager(None, 33, 33, 65, 0.1, dtype)
    test_native.test_experts_are_as_exact_as_eager("odd", (23, 37), dtype, monkeypatch)
    test_native.test_cca_is_as_exact_as_eager(test_native.SHAPES[0], dtype)
    test_native_router.test_router_is_as_exact_as_eager(test_native_router.SIZES[3], False, dtype)

"""How the library in C comes to be, and what is said where it cannot."""

from __future__ import annotations

import platform
import pwd
from typing import TYPE_CHECKING

import pytest
from zaya_kernels.native import library

from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


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

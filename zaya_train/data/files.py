"""What the manifests say about files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zaya_train.runtime.files import file_sha256

if TYPE_CHECKING:
    from pathlib import Path


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a corpus that is being built."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in files
    }

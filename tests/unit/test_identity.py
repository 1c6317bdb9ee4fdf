"""What a checkpoint and a run keep of what decided the curve, and what a resume refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import zaya_kernels

import zaya_train
from tests.faults.states import record
from tests.helpers.tiny import DELETED, changed, tiny
from zaya_train.config.build import to_dict
from zaya_train.config.errors import CheckpointError, ConfigError
from zaya_train.phases.lineage import changes, lineage
from zaya_train.runtime.versions import code_hash, sources_hash
from zaya_train.train.entry import changed_math
from zaya_train.train.identity import RUN_FILE, identity_of, read_attempts, record_identity
from zaya_train.train.manifest import Manifest, decode, encode

CORPORA = {"problems": "aa11"}
COMPUTING = "config data hub model optim parallel phases train runtime/seeds.py run.py"


def sealed(body: dict[str, Any]) -> bytes:
    """As MANIFEST.json of any version is written."""

    def dump(value: object) -> bytes:
        return json.dumps(value, sort_keys=True, indent=1).encode("ascii") + b"\n"

    return dump({"sha256": hashlib.sha256(dump(body)).hexdigest(), "manifest": body})


def body(**changes: Any) -> dict[str, Any]:
    manifest = Manifest(torch_version="2", files=(), tensors={}, record=record(3))
    written: dict[str, Any] = json.loads(encode(manifest))["manifest"]
    return {**written, **changes}


def test_a_checkpoint_keeps_the_identity() -> None:
    identity = identity_of(tiny(), CORPORA, 2, {"code": "c", "torch": "t", "device": "d"})
    kept = record(3, identity=json.loads(json.dumps(identity.to_dict())))
    manifest = Manifest(torch_version="2", files=(), tensors={}, record=kept)
    assert decode(encode(manifest)) == manifest
    assert decode(encode(manifest)).record.identity == identity.to_dict()


def test_checkpoints_without_identity_are_read() -> None:
    old = body(format_version=2)
    del old["record"]["identity"]
    assert decode(sealed(old)).record == record(3)
    with pytest.raises(CheckpointError, match="do not match its own hash"):
        decode(sealed(old).replace(b'"c0ffee"', b'"c0ffe0"'))


@pytest.mark.parametrize("version", [1, 4, "3"])
def test_manifests_of_other_versions_are_not(version: object) -> None:
    with pytest.raises(CheckpointError, match=r"format .*, this version reads 2 and 3"):
        decode(sealed(body(format_version=version)))


def test_a_record_must_be_complete() -> None:
    lacking = body()
    del lacking["record"]["identity"]
    with pytest.raises(CheckpointError, match="not a manifest"):
        decode(sealed(lacking))


def test_the_runs_manifest_grows_by_an_entry_per_attempt(tmp_path: Path) -> None:
    for attempt, step, values in ((1, 0, {}), (2, 40, {"optim.clip_norm": 2.0})):
        record_identity(tmp_path, attempt, step, identity_of(tiny(values), CORPORA, 1, {}))
    first, second = read_attempts(tmp_path)
    assert (first["attempt"], first["step"], second["attempt"], second["step"]) == (1, 0, 2, 40)
    assert first["math_hash"] != second["math_hash"]
    assert first["corpora"] == CORPORA and "config" not in first


@pytest.mark.parametrize("text", ["", "[]", '{"attempts": [1]}', '{"attempts": [{"step": 1}]}'])
def test_a_manifest_that_is_none_is_set_aside(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank writes it: an error would end that rank alone."""
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json: not a run's manifest"):
        read_attempts(tmp_path)
    record_identity(tmp_path, 4, 20, identity_of(tiny(), CORPORA, 1, {}))
    (entry,) = read_attempts(tmp_path)
    assert (entry["attempt"], entry["step"]) == (4, 20)
    assert (tmp_path / "run.json.bad").read_text() == text
    assert "run.json: not a run's manifest" in caplog.text and "run.json.bad" in caplog.text


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages' sources."""
    folder = tmp_path_factory.mktemp("sources")
    for package in (zaya_train, zaya_kernels):
        root = Path(str(package.__file__)).parent
        for file in root.rglob("*.py"):
            copy = folder / root.name / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return folder


def hash_in(folder: Path) -> str:
    return sources_hash(folder / "zaya_train", folder / "zaya_kernels")


def test_the_same_sources_elsewhere_are_the_same_code(sources: Path) -> None:
    assert len(code_hash()) == 16
    assert hash_in(sources) == code_hash() != sources_hash(sources / "zaya_train", None)


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        *((f"zaya_train/{place}", True) for place in COMPUTING.split()),
        ("zaya_kernels", True),
        ("zaya_kernels/cca", True),
        ("zaya_train/tools", False),
        ("zaya_train/runtime/log.py", False),
    ],
)
def test_the_code_is_told_apart_by_its_sources(sources: Path, name: str, tells: bool) -> None:
    before = hash_in(sources)
    file = sources / name
    if file.is_dir():
        added = file / "added.py"
        added.write_text("")
        assert (hash_in(sources) != before) is tells
        added.unlink()
        file = min(file.glob("*.py"))
    text = file.read_text()
    file.write_text(text + "\n")
    assert (hash_in(sources) != before) is tells
    file.write_text(text)
    assert hash_in(sources) == before


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"optim.muon.learning_rate": 0.03}, True),
        ({"optim.balancing.skip_target": 0.1}, True),
        ({"optim.z_loss": 1e-4}, True),
        ({"precision.reduce_dtype": "bf16"}, True),
        ({"guard.sigma": 3.0}, True),
        ({"kernels.cca": "reference"}, False),
        ({"parallel.accumulation": "reduce_each"}, False),
        ({"checkpoint.every_steps": 7}, False),
        # The start is behind a run that resumes.
        ({"checkpoint.initial_weights": "folder"}, False),
        ({"model.init_std": 0.5}, False),
        # Lineage judges these, by phase.
        ({"run.seed": 4}, False),
        ({"plan.phases.long.tokens": 4096}, False),
    ],
)
def test_math_that_changed_on_a_resume(change: dict[str, Any], refused: bool) -> None:
    before = json.loads(json.dumps(to_dict(tiny())))
    assert list(changed_math(before, tiny(change))) == (list(change) if refused else [])


def test_a_key_of_a_later_version_had_the_effect_of_its_default() -> None:
    earlier = changed(to_dict(tiny()), {"optim.clip_norm": DELETED})
    assert changed_math(earlier, tiny()) == {}
    assert changed_math(earlier, tiny({"optim.clip_norm": 2.0})) == {"optim.clip_norm": (1.0, 2.0)}
    assert changed_math({}, tiny({"optim.clip_norm": 2.0})) == {}


def test_of_phases_behind_a_checkpoint_only_rates_may_be_named() -> None:
    before = json.loads(json.dumps(lineage(tiny(), 0, CORPORA)))
    key = "plan.phases.short"
    for change, named, left in (
        ({"learning_rate_scale": 2.0}, ["learning_rate_scale"], 0),
        ({"learning_rate_scale": 2.0}, [], 1),
        ({"schedule.final_ratio": 0.1}, ["schedule.final_ratio"], 0),
        ({"schedule.final_ratio": 0.1, "schedule.decay_tokens": 0}, ["schedule.final_ratio"], 1),
        ({"global_batch_tokens": 512}, ["global_batch_tokens"], 1),
        ({"mixture.problems": 2.0}, ["mixture.problems", "mixture"], 1),
    ):
        config = tiny({f"{key}.{name}": value for name, value in change.items()})
        allowed = [f"{key}.{name}" for name in named]
        assert len(changes(before, config, CORPORA, allowed)) == left, change

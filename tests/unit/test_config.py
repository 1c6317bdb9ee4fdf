"""YAML to typed configuration: recipes, strictness, defaults, what the package imports."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.models import every
from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import DELETED, RUN, changed, tiny
from zaya_train.config.build import build, to_dict
from zaya_train.config.check import check, problems
from zaya_train.config.cluster import SubmitConfig
from zaya_train.config.defaults import MISSING, defaults
from zaya_train.config.derive import config_hash, context_degree, layout
from zaya_train.config.errors import ConfigError
from zaya_train.config.schema import KernelsConfig, ParallelConfig, TrainConfig
from zaya_train.main import compose, compose_submission, config_dir

if TYPE_CHECKING:
    from pathlib import Path

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs" / "recipe").glob("*.yaml"))
WORLDS = {
    "smoke_cpu": (1, 2),
    "zaya1_300m": (1,),
    "zaya1_8b": (8, 64, 1024),
    "zaya1_8b_1gpu": (1,),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_fits_its_ranks(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe in WORLDS, f"name the numbers of ranks that recipe {recipe} is meant for"
    for world in WORLDS[recipe]:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        config = compose([f"recipe={recipe}"])
        check(config, world)
        for phase in config.plan.phases.values():
            assert layout(phase, config.parallel, world).world == world
        assert build(TrainConfig, to_dict(config)) == config


def test_every_yaml_is_reachable_from_a_recipe_or_by_its_group() -> None:
    for path in sorted((REPOSITORY / "configs").glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        overrides = ["recipe=smoke_cpu", "run.name=x"]
        if group == "cluster":
            submission, rest = compose_submission([*overrides, f"cluster={name}", "nodes=1"])
            assert isinstance(submission, SubmitConfig) and rest == overrides, path
            continue
        if group == "phase":
            overrides.append(f"+phase@plan.phases.extra={name}")
        elif group == "recipe":
            overrides = [f"recipe={name}"]
        else:
            overrides.append(f"{group}={name}")
        config = compose(overrides)
        assert isinstance(config, TrainConfig), path


def test_the_documented_site_file_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs" / "cluster.md").read_text()
    (site,) = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr("zaya_train.main.config_dir", lambda: tmp_path / "configs")
    shutil.copytree(config_dir(), tmp_path / "configs")
    (tmp_path / "configs" / "cluster" / "mysite.yaml").write_text(site)
    chosen, _ = compose_submission(["cluster=mysite", "nodes=1"])
    base, _ = compose_submission(["cluster=mi300x_pollara", "nodes=1"])
    assert (chosen.partition, chosen.container.mounts) == ("gpu", "/data,/scratch")
    assert chosen.environment.keys() == base.environment.keys()
    assert chosen.environment["NCCL_IB_TC"].value != base.environment["NCCL_IB_TC"].value


def test_published_recipe_is_the_published_model() -> None:
    config = compose(["recipe=zaya1_8b"])
    phases = config.plan.phases
    assert [p.context_tokens for p in phases.values()] == [4096, 4096, 32768, 131072]
    assert [p.rope_base for p in phases.values()] == [1e4, 1e4, 1e6, 5e6]
    assert [p.context_parallel for p in phases.values()] == [1, 1, 2, 8]
    assert (config.model.num_layers, config.model.hidden_size) == (40, 2048)
    assert config.precision.compute_dtype == "bf16"


def test_smoke_recipe_keeps_the_published_context_ratios() -> None:
    contexts = [p.context_tokens for p in compose(["recipe=smoke_cpu"]).plan.phases.values()]
    assert [c // contexts[0] for c in contexts] == [1, 1, 8, 32]


def test_overrides_reach_every_level() -> None:
    config = compose(
        ["recipe=smoke_cpu", "run.seed=7", "optim.muon.momentum=0.5", "plan.phases.sft.tokens=4096"]
    )
    assert (config.run.seed, config.optim.muon.momentum) == (7, 0.5)
    assert config.plan.phases["sft"].tokens == 4096


def test_round_trip_of_a_run_with_everything_set() -> None:
    ramp = {"start_tokens": 128, "over_tokens": 512}
    config = tiny({"plan.phases.short.batch_ramp": ramp, "checkpoint.initial_weights": "somewhere"})
    assert build(TrainConfig, to_dict(config)) == config
    assert config_hash(build(TrainConfig, to_dict(config))) == config_hash(config)
    assert config_hash(config) != config_hash(tiny())


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model.hiden_size": 4}, ["model.hiden_size", "unknown key", "hidden_size"]),
        ({"modle": {}}, ["modle: unknown key", "model"]),
        ({"plan.phases.short.tokns": 4}, ["plan.phases.short.tokns", "did you mean tokens"]),
        (
            {"plan.phases.short.schedule.warmup": 4},
            ["plan.phases.short.schedule.warmup", "did you mean warmup_tokens"],
        ),
        ({"data.sources.problems.zzz": 1}, ["data.sources.problems.zzz: unknown key"]),
        ({"model.vocab_size": DELETED}, ["model.vocab_size: missing"]),
        ({"run.name": "???"}, ["run.name: missing"]),
        ({"logging.wandb_project": "???"}, ["logging.wandb_project: missing"]),
        ({"plan.phases.long.mixture": DELETED}, ["plan.phases.long.mixture: missing"]),
        ({"optim.adamw": DELETED}, ["optim.adamw: missing"]),
        ({"model.num_layers": "4"}, ["model.num_layers", "expected int", "str '4'"]),
        ({"model.num_layers": 4.0}, ["model.num_layers", "expected int", "float 4.0"]),
        ({"model.num_layers": True}, ["model.num_layers", "expected int", "bool True"]),
        ({"model.num_layers": None}, ["model.num_layers", "expected int", "None"]),
        ({"model.norm_eps": "1e-5"}, ["model.norm_eps", "expected float", "'1e-5'"]),
        ({"model.norm_eps": False}, ["model.norm_eps", "expected float", "bool"]),
        ({"model.skip_class": 1}, ["model.skip_class", "expected bool", "int 1"]),
        ({"run.dir": 3}, ["run.dir", "expected str", "int 3"]),
        ({"model": 3}, ["model: expected a mapping", "int 3"]),
        ({"plan.phases": ["short"]}, ["plan.phases: expected a mapping", "list"]),
        ({"plan.phases.short": None}, ["plan.phases.short: expected a mapping", "None"]),
        ({"plan.phases.short.mixture.problems": "x"}, ["short.mixture.problems", "expected float"]),
        ({"plan.phases.short.batch_ramp": 3}, ["short.batch_ramp", "expected a mapping"]),
        (
            {"plan.phases.short.batch_ramp": {"start_tokens": 1}},
            ["batch_ramp.over_tokens: missing"],
        ),
        ({"plan.phases.short.schedule.kind": "wds"}, ["schedule.kind", "'wds'", "cosine"]),
        ({"precision.compute_dtype": "fp16"}, ["precision.compute_dtype", "fp16", "bf16"]),
        ({"kernels.cca": "cuda"}, ["kernels.cca", "'cuda'", "eager", "triton"]),
        ({"kernels.newton_schulz": "sdpa"}, ["kernels.newton_schulz", "'sdpa'", "gram", "triton"]),
        ({"parallel.context_chunks": []}, ["parallel.context_chunks", "head_tail"]),
    ],
)
def test_wrong_keys_and_types_are_named_in_one_line(
    changes: dict[str, Any], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TrainConfig, changed(RUN, changes))
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_configuration_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match="config: expected a mapping"):
        build(TrainConfig, [1])


def test_ints_serve_as_floats_and_nothing_else_is_converted() -> None:
    config = tiny({"model.rope_base": 10_000, "optim.clip_norm": 0})
    assert isinstance(config.model.rope_base, float)
    assert isinstance(config.optim.clip_norm, float)


def test_defaults_hold_every_key_of_the_schema() -> None:
    base = defaults(TrainConfig)
    assert base["model"]["vocab_size"] == MISSING
    assert base["model"]["norm_eps"] == 1e-5
    assert base["plan"]["phases"] == {}
    assert base["kernels"] == to_dict(KernelsConfig())
    assert list(base) == [field.name for field in dataclasses.fields(TrainConfig)]
    with pytest.raises(ConfigError, match="missing"):
        build(TrainConfig, base)


def test_context_limit_lowers_and_never_raises_a_degree() -> None:
    phase = tiny().plan.phases["long"]
    assert context_degree(phase, ParallelConfig(), 4) == 2
    assert context_degree(phase, ParallelConfig(context_parallel_limit=1), 4) == 1
    assert context_degree(phase, ParallelConfig(context_parallel_limit=8), 4) == 2
    fit = ParallelConfig(context_parallel_fit=True)
    assert [context_degree(phase, fit, world) for world in (1, 2, 3, 4)] == [1, 2, 1, 2]


def test_layout_multiplies_to_the_world() -> None:
    phase = tiny().plan.phases["long"]
    degrees = layout(phase, ParallelConfig(shard=4), 16)
    assert (degrees.replicate, degrees.shard, degrees.context) == (4, 2, 2)
    assert (degrees.data, degrees.world) == (8, 16)


def test_valid_run_has_no_problems() -> None:
    assert list(problems(tiny(), 2)) == []
    assert list(problems(tiny({"parallel.context_parallel_limit": 1}), 1)) == []


def test_config_imports_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import zaya_train.config.build, zaya_train.config.check, zaya_train.config.defaults\n"
        "import zaya_train.config.derive, zaya_train.config.errors, zaya_train.config.schema\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(' '.join(sorted(new - set(sys.stdlib_module_names) - {'zaya_train'})))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_config_directory_is_the_checkouts() -> None:
    assert (config_dir() / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["recipe=smoke_cpu", "model.hiden_size=3"], ["model.hiden_size", "unknown key"]),
        (["recipe=nope"], ["recipe=nope", "smoke_cpu"]),
        ([], ["recipe"]),
        (["recipe=smoke_cpu", "model.hidden_size=[1"], ["[1"]),
        (["recipe=smoke_cpu", "model.hidden_size=abc"], ["model.hidden_size", "abc"]),
        (["recipe=smoke_cpu", "run.dir=${nowhere.at_all}"], ["nowhere"]),
    ],
)
def test_what_hydra_refuses_is_a_config_error_in_one_line(
    overrides: list[str], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert str(REPOSITORY) not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("group", ["eager", "native", "triton"])
def test_a_group_of_kernels_names_every_operation_that_has_them(group: str) -> None:
    config = compose(["recipe=smoke_cpu", f"kernels={group}"])
    assert config.kernels == every(group)
    chosen = to_dict(config.kernels)
    other = to_dict(compose(["recipe=smoke_cpu", f"kernels={group}", "kernels.cca=reference"]))
    assert other["kernels"] == {**chosen, "cca": "reference"}

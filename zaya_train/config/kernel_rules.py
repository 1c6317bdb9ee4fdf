"""What the kernels' back ends can do: shapes of a model, and where they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zaya_train.config.precision import PrecisionConfig
    from zaya_train.config.schema import KernelsConfig, ModelConfig

PACKAGES = {
    "aiter": ("aiter", "install it from github.com/ROCm/aiter"),
    "flash_attn": ("flash_attn", "pip install flash-attn (FLASH_ATTN_VERSION of docker/pins.env)"),
    "transformer_engine": (
        "transformer_engine",
        "pip install 'zaya-train[te]', on ROCm as docker/rocm.Dockerfile does with EXTRAS=te",
    ),
    "triton": ("triton", "pip install 'zaya-train[triton]'"),
}
"""Back end that needs a GPU -> the package it imports, and how to get that."""
EMULATED = ("fp8_emulated", "fp8_emulated_fnuz")
FP8_MULTIPLE = 16
"""Of every width of a product in fp8 by transformer_engine."""


def kernel_problems(
    kernels: KernelsConfig, model: ModelConfig, precision: PrecisionConfig
) -> Iterator[str]:
    """Back ends that cannot run this model in this precision, one line each."""
    if kernels.cca == "triton":
        yield from _triton_cca(model)
    if kernels.attention == "triton" and model.head_dim not in (16, 32, 64, 128):
        yield (
            f"kernels.attention=triton: model.head_dim {model.head_dim} must be 16, 32, 64 or 128"
        )
    if kernels.attention in ("aiter", "flash_attn"):
        yield from _library_attention(kernels.attention, model, precision)
    if kernels.router == "triton":
        yield from _triton_router(model)
    if kernels.moe_permute == "triton" and model.num_experts > 511:
        yield (
            f"kernels.moe_permute=triton: model.num_experts {model.num_experts} must be at most 511"
        )
    if kernels.linear_cross_entropy == "triton" and model.hidden_size % 16:
        yield (
            f"kernels.linear_cross_entropy=triton: model.hidden_size {model.hidden_size} "
            "must be a multiple of 16"
        )
    if kernels.grouped_mlp == "grouped_mm":
        yield from _grouped_mm(model, precision)
    yield from _fp8(kernels, model, precision)
    if kernels.grouped_mlp_recompute and kernels.grouped_mlp != "triton":
        yield (
            "kernels.grouped_mlp_recompute: "
            f"kernels.grouped_mlp={kernels.grouped_mlp} keeps the pre-activation; it needs "
            "triton"
        )


def _fp8(kernels: KernelsConfig, model: ModelConfig, precision: PrecisionConfig) -> Iterator[str]:
    """precision.expert_dtype and the back end that has to know it."""
    key, name = "precision.expert_dtype=fp8", kernels.grouped_mlp
    if precision.expert_dtype != "fp8":
        if name in EMULATED:
            yield f"kernels.grouped_mlp={name}: has fp8's arithmetic alone; it needs {key}"
        return
    if name not in (*EMULATED, "transformer_engine"):
        yield (
            f"{key}: kernels.grouped_mlp={name} multiplies in precision.compute_dtype; it needs "
            f"transformer_engine, or slowly, to see what fp8 does, {' or '.join(EMULATED)}"
        )
    if precision.compute_dtype != "bf16":
        yield f"{key}: needs precision.compute_dtype=bf16, not {precision.compute_dtype}"
    for field in ("hidden_size", "expert_ffn_size"):
        value = getattr(model, field)
        if name == "transformer_engine" and value % FP8_MULTIPLE:
            yield f"{key}: model.{field} {value} must be a multiple of {FP8_MULTIPLE}"


def fp8_device_problem(
    device: str, arch: str | None, capability: tuple[int, int] | None
) -> Iterator[str]:
    """Whether a GPU multiplies in fp8: AMD's gfx94x and gfx95x do (`arch`, else None), NVIDIA's
    from compute capability 8.9 on."""
    known = arch.startswith(("gfx94", "gfx95")) if arch else (capability or (0, 0)) >= (8, 9)
    if not known:
        found = arch or f"compute capability {'.'.join(map(str, capability or ()))}"
        yield (
            f"precision.expert_dtype=fp8: {device} ({found}) has no products in fp8; it needs "
            "gfx942, gfx950, or NVIDIA's from compute capability 8.9 on"
        )


def host_problems(kernels: KernelsConfig, command: str) -> Iterator[str]:
    """Back ends that `command` cannot run, since it computes on the host."""
    for key, name in vars(kernels).items():
        if name in PACKAGES:
            yield (
                f"kernels.{key}={name}: {command} computes on the host, this back end needs a GPU; "
                f"add kernels.{key}=eager"
            )
    if kernels.grouped_mlp_recompute:
        yield f"kernels.grouped_mlp_recompute: of triton, see above; {command} needs it false"


def rounding_problems(precision: PrecisionConfig) -> Iterator[str]:
    """Experts in fp8, for a check whose layouts have to agree to fp32's rounding: scales are of the
    rows that are on a rank together."""
    if precision.expert_dtype == "fp8":
        yield (
            "precision.expert_dtype=fp8: zaya doctor compares layouts to fp32's rounding; add "
            "precision.expert_dtype=compute_dtype kernels.grouped_mlp=eager; zaya parity is the "
            "check of fp8"
        )


def _library_attention(name: str, model: ModelConfig, precision: PrecisionConfig) -> Iterator[str]:
    """What both libraries' kernels take."""
    if precision.compute_dtype != "bf16":
        yield (
            f"kernels.attention={name}: takes bf16, precision.compute_dtype is "
            f"{precision.compute_dtype}"
        )
    if model.head_dim % 8 or model.head_dim > 256:
        yield (
            f"kernels.attention={name}: model.head_dim {model.head_dim} must be a multiple of 8 "
            "and at most 256"
        )


def rehearsal_problems(kernels: KernelsConfig, precision: PrecisionConfig) -> Iterator[str]:
    """Back ends that a rehearsal, on the host and without numbers, cannot run, one line each."""
    yield from host_problems(kernels, "a rehearsal")
    if kernels.grouped_mlp == "grouped_mm" and precision.compute_dtype != "bf16":
        yield (
            "kernels.grouped_mlp=grouped_mm: torch knows the shapes of its results in bf16 only; a "
            "rehearsal needs precision.compute_dtype=bf16 or kernels.grouped_mlp=eager"
        )


def _grouped_mm(model: ModelConfig, precision: PrecisionConfig) -> Iterator[str]:
    """Rows of every operand must be multiples of 16 bytes."""
    step = 4 if precision.compute_dtype == "fp32" else 8
    for key, value in (
        ("hidden_size", model.hidden_size),
        ("expert_ffn_size", model.expert_ffn_size),
    ):
        if value % step:
            yield (
                f"kernels.grouped_mlp=grouped_mm: model.{key} {value} must be a multiple of {step} "
                f"in precision.compute_dtype={precision.compute_dtype}"
            )


def _triton_cca(model: ModelConfig) -> Iterator[str]:
    """Shapes that the Triton kernels of CCA can do."""
    size, rotated = model.head_dim, int(model.head_dim * model.rope_fraction)
    if size < 32 or size & (size - 1):
        yield f"kernels.cca=triton: model.head_dim {size} must be a power of two from 32"
    if rotated % 16:
        yield (
            f"kernels.cca=triton: model.rope_fraction {model.rope_fraction} rotates {rotated} "
            "channels; it must be a multiple of 16 of them"
        )


def _triton_router(model: ModelConfig) -> Iterator[str]:
    """Shapes that the Triton kernels of the router can do."""
    size = model.router_size
    if size < 16 or size & (size - 1):
        yield f"kernels.router=triton: model.router_size {size} must be a power of two from 16"
    if model.hidden_size % 16:
        yield (
            f"kernels.router=triton: model.hidden_size {model.hidden_size} must be a multiple of 16"
        )

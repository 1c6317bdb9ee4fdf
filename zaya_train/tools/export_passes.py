"""Forward passes of our model and of transformers' over one document, with every expert choice.

Legend: L layers, S tokens, D hidden, C router classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from safetensors import safe_open

from zaya_train.config.errors import CheckpointError
from zaya_train.hub.config import config_from_hf, config_to_hf, read_config
from zaya_train.hub.convert import meta_model, tensor_files
from zaya_train.hub.names import tensor_names
from zaya_train.tools.generate import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from zaya_train.config.schema import ModelConfig
    from zaya_train.hub.names import Layout
    from zaya_train.model.zaya import ZayaModel

SkipOutput = Literal["identity", "zero"]
SKIP_BIAS = -1.0
"""What transformers 5.23.0 writes over the skip class's balancing bias when it loads a model."""
_BIAS = "mlp.gate.balancing_biases"


@dataclass
class Pass:
    """What one model made of one document."""

    logits: Tensor
    """[S, V] fp32."""
    choices: list[Tensor] = field(default_factory=list)
    """L of [S]."""
    scores: list[Tensor] = field(default_factory=list)
    """L of [S, C] fp32: what the choice is the largest of; of transformers only."""
    streams: list[Tensor] = field(default_factory=list)
    """L of [S, D] fp32: the residual stream behind each layer."""


def our_pass(model: ZayaModel, ids: Tensor) -> Pass:
    """ids [S] of one document."""
    found = Pass(torch.empty(0))
    layers: Any = model.layers

    def routed(module: nn.Module, given: Any, result: Any) -> None:
        found.choices.append(result.choice[0])

    def stream(module: nn.Module, given: Any, result: Any) -> None:
        found.streams.append(result[0][0].float())

    hooks = [layer.moe.router.register_forward_hook(routed) for layer in layers]
    hooks += [layer.register_forward_hook(stream) for layer in layers]
    found.logits = _without_gradients(lambda: model.logits(ids.unsqueeze(0)), hooks)[0]
    return found


def their_pass(model: Any, ids: Tensor, forced: Sequence[Tensor] | None = None) -> Pass:
    """ids [S] of one document through transformers' model.

    forced: L of [S], the experts that tokens go to whatever its own choices are. Behind a choice
    that is a tie to rounding everything else would be another computation.
    """
    found = Pass(torch.empty(0))

    def routed(module: Any, given: Any, result: Any) -> Any:
        # As ZayaRouter: softmax in its own precision, the bias in fp32. Its own index says 0 for
        # a skipped token.
        shares = result[0].softmax(-1)
        scores = shares.float() + module.balancing_biases
        found.scores.append(scores)
        found.choices.append(scores.topk(1, dim=-1).indices.squeeze(-1))
        if forced is None:
            return result
        choice = forced[len(found.choices) - 1].unsqueeze(1)
        skips = choice == module.num_experts
        taken = shares.gather(1, choice).masked_fill(skips, 0)
        return (result[0], taken, choice.masked_fill(skips, 0), *result[3:])

    def stream(module: nn.Module, given: Any, result: Any) -> None:
        found.streams.append(result[0][0].float())

    hooks = [layer.mlp.gate.register_forward_hook(routed) for layer in model.model.layers]
    hooks += [layer.register_forward_hook(stream) for layer in model.model.layers]
    run = lambda: model(ids.unsqueeze(0), use_cache=False).logits  # noqa: E731
    found.logits = _without_gradients(run, hooks)[0].float()
    return found


def _without_gradients(run: Callable[[], Tensor], hooks: list[Any]) -> Tensor:
    try:
        with torch.inference_mode():
            return run()
    finally:
        for hook in hooks:
            hook.remove()


def model_of(
    tensors: Mapping[str, Tensor], config: ModelConfig, skip_output: SkipOutput
) -> ZayaModel:
    """Our model over these tensors, in fp32, with another output for skipped tokens."""
    model = meta_model(replace(config, skip_output=skip_output))
    model.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return model.requires_grad_(False)


def twin_of(
    folder: Path, layout: Layout, dtype: torch.dtype | None, held: Mapping[str, Tensor]
) -> tuple[Any, Callable[[str], Tensor]]:
    """transformers' model of an exported folder, and what reads a stored tensor by its native name;
    dtype None: the one that is stored; held: our names -> values read from the folder.

    transformers reads the native layout. A legacy folder is read by this project and handed over
    under the native names: what its file holds is tried, its names are not.

    Raises:
        CheckpointError: a tensor is missing, surplus, of another shape, or not what the file holds
            (but for the skip class's balancing biases).
    """
    names, read = _reader(folder, layout, held)
    if layout == "native":
        model = load_model(folder, dtype or "auto", experts="eager")
    else:
        load: Any = transformers.ZayaForCausalLM.from_pretrained
        model = load(
            None,
            config=transformers.ZayaConfig(**config_to_hf(config_from_hf(folder))),
            # Loading writes into the biases that it is handed.
            state_dict={n: read(n).clone() if n.endswith(_BIAS) else read(n) for n in names},
            dtype=dtype or getattr(torch, read_config(folder)["dtype"]),
            experts_implementation="eager",
        )
    if dtype == torch.float32:
        _require_loaded(folder, model, names, read)
    return model.eval(), read


def restore_skip_biases(model: Any, read: Callable[[str], Tensor]) -> list[int]:
    """Put the skip class's stored biases back into transformers' model; the layers in which
    loading had changed them."""
    changed = []
    for number, layer in enumerate(model.model.layers):
        stored = read(f"model.layers.{number}.{_BIAS}").to(layer.mlp.gate.balancing_biases)
        if not torch.equal(stored, layer.mlp.gate.balancing_biases):
            changed.append(number)
            layer.mlp.gate.balancing_biases.copy_(stored)
    return changed


def _reader(
    folder: Path, layout: Layout, held: Mapping[str, Tensor]
) -> tuple[set[str], Callable[[str], Tensor]]:
    """Native names of a folder's tensors, and what reads one; of a legacy one from what is held."""
    if layout == "legacy":
        state = dict(_native_state(config_from_hf(folder), held))
        return set(state), state.__getitem__
    files = tensor_files(folder)

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
        return tensor

    return set(files), read


def _native_state(config: ModelConfig, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    shapes = {name: tuple(value.shape) for name, value in held.items()}
    for name in tensor_names(shapes, config, "native").values():
        yield name.theirs[0], held[name.ours].reshape(name.their_shape)


def _require_loaded(
    folder: Path, model: Any, stored: set[str], read: Callable[[str], Tensor]
) -> None:
    """Every value as transformers holds it against the file's, bitwise."""
    state, tied = model.state_dict(), {"lm_head.weight"}
    if odd := sorted((set(state) - tied) ^ (stored - tied)):
        raise CheckpointError(f"{folder}: transformers and the file differ in tensor {odd[0]}")
    for name in sorted(stored - tied):
        found, expected = state[name], read(name).to(state[name].dtype)
        if name.endswith(_BIAS):
            found, expected = found[:-1], expected[:-1]
        if not torch.equal(found, expected):
            raise CheckpointError(f"{folder}: transformers holds other values in {name}")

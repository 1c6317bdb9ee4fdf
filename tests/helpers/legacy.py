"""A forward pass straight from the tensors of a legacy folder, by the papers' equations.

transformers reads the native layout only, so this is what judges the legacy one: it knows its names
and its order of layers, and nothing of our table of names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def legacy_logits(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], ids: Tensor
) -> Tensor:
    """ids [S] of one document -> [S, V]; a skipped token gets its own input, times its probability.

    settings: the folder's config.json.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    count = settings["num_hidden_layers"]
    branch, stream, state = t["model.embed_tokens.weight"][ids], None, None
    for layer in range(count):
        place = f"model.layers.{layer}"
        stream = _joined(t, place, branch, stream)
        x = _norm(stream, t[f"{place}.input_norm.weight"], settings)
        if layer % 2 == 0:
            branch = _attention(t, f"{place}.self_attn", x, settings)
        else:
            branch, state = _experts(t, f"{place}.zaya_block", x, state, settings)
    stream = _joined(t, "model", branch, stream)
    hidden = _norm(stream, t["model.final_norm.weight"], settings)
    return hidden @ t["model.embed_tokens.weight"].t()


def _joined(t: Mapping[str, Tensor], place: str, branch: Tensor, stream: Tensor | None) -> Tensor:
    def scaled(value: Tensor, kind: str) -> Tensor:
        return (value + t[f"{place}.res_scale.{kind}_bias"]) * t[f"{place}.res_scale.{kind}_scale"]

    branch = scaled(branch, "hidden_states")
    return branch if stream is None else branch + scaled(stream, "residual")


def _norm(x: Tensor, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + settings["norm_epsilon"]) * weight


def _attention(
    t: Mapping[str, Tensor], place: str, x: Tensor, settings: Mapping[str, Any]
) -> Tensor:
    """x [S, D] -> [S, D]; arXiv 2510.04476."""
    heads, groups = settings["num_attention_heads"], settings["num_query_groups"]
    d, qkv = settings["head_dim"], f"{place}.qkv"
    q0, k0 = x @ t[f"{qkv}.linear_q.weight"].t(), x @ t[f"{qkv}.linear_k.weight"].t()
    padding = settings["cca_time0"] + settings["cca_time1"] - 2
    c = functional.pad(torch.cat([q0, k0], 1).t(), (padding, 0))
    for number, split in ((0, c.shape[0]), (1, heads + groups)):
        weight, bias = t[f"{qkv}.conv_qk.{number}.weight"], t[f"{qkv}.conv_qk.{number}.bias"]
        c = functional.conv1d(c, weight, bias, groups=split)
    q0, k0 = q0.view(-1, heads, d), k0.view(-1, groups, d)
    mean_q = (q0 + k0.repeat_interleave(heads // groups, 1)) / 2
    mean_k = mean_q.view(-1, groups, heads // groups, d).mean(2)
    mixed = c.t().reshape(-1, heads + groups, d)
    q, k = mixed[:, :heads] + mean_q, mixed[:, heads:] + mean_k
    q = functional.normalize(q, dim=-1) * d**0.5
    k = functional.normalize(k, dim=-1) * d**0.5 * t[f"{qkv}.temp"].view(-1, 1)
    q, k = _rotated(q, settings), _rotated(k, settings)
    before = functional.pad(x[:-1], (0, 0, 1, 0))
    v = torch.cat(
        [x @ t[f"{qkv}.val_proj1.weight"].t(), before @ t[f"{qkv}.val_proj2.weight"].t()], 1
    )
    v = v.view(-1, groups, d).repeat_interleave(heads // groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(heads // groups, 1)) / d**0.5
    causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ t[f"{place}.o_proj.weight"].t()


def _rotated(x: Tensor, settings: Mapping[str, Any]) -> Tensor:
    width = int(settings["head_dim"] * settings["partial_rotary_factor"])
    rates = settings["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.arange(len(x)).double().outer(rates).unsqueeze(1)
    one, two = x[..., : width // 2], x[..., width // 2 : width]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin, x[..., width:]], -1)


def _experts(
    t: Mapping[str, Tensor],
    place: str,
    x: Tensor,
    previous: Tensor | None,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """x [S, D], the router state of the layer before -> output [S, D] and router state."""
    router = f"{place}.router"
    state = x @ t[f"{router}.down_proj.weight"].t() + t[f"{router}.down_proj.bias"]
    if previous is not None:
        state = state + previous * t[f"{router}.router_states_scale"]
    hidden = _norm(state, t[f"{router}.rmsnorm_eda.weight"], settings)
    for number in (0, 2):
        weight, bias = (
            t[f"{router}.router_mlp.{number}.weight"],
            t[f"{router}.router_mlp.{number}.bias"],
        )
        hidden = functional.gelu(hidden @ weight.t() + bias)
    shares = (hidden @ t[f"{router}.router_mlp.4.weight"].t()).softmax(-1)
    choice = (shares + t[f"{router}.balancing_biases"]).argmax(-1)
    rows = []
    for row, expert in zip(x, choice.tolist(), strict=True):
        if expert == settings["num_experts"]:
            rows.append(row)
            continue
        weights = f"{place}.experts.local_experts.{expert}"
        gate, up = (t[f"{weights}.linear_fc1.weight"] @ row).chunk(2)
        rows.append(t[f"{weights}.linear_fc2.weight"] @ (functional.silu(gate) * up))
    return torch.stack(rows) * shares.gather(1, choice.unsqueeze(1)), state

"""What ranks must agree on before a state is written: its step, its tensors, and that all is
finite."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from zaya_train.config.errors import CheckpointError, NumericsError
from zaya_train.train.restore import entries_of
from zaya_train.train.staging import local_shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from zaya_train.train.manifest import TensorEntry
    from zaya_train.train.peers import Peers


def agreed_entries(
    tensors: Mapping[str, Tensor], step: int, peers: Peers
) -> dict[str, TensorEntry]:
    """The tensors as a manifest lists them. Collective.

    Raises:
        NumericsError: a tensor is not finite, or ranks differ in the value of one that is no
            DTensor: replicas have come apart.
        CheckpointError: ranks differ in the step, in keys or shapes.
    """
    entries = entries_of(tensors)
    plain = _plain_digests(tensors)
    signature = sha256(repr((step, sorted(entries.items()))).encode()).hexdigest()
    plain_signature = sha256(repr(sorted(plain.items())).encode()).hexdigest()
    reports = peers.gather((signature, plain_signature, not_finite(tensors)))
    for rank, (theirs, _, _) in enumerate(reports):
        if theirs != reports[0][0]:
            raise CheckpointError(
                f"rank {rank} saves another step, other keys or other shapes than rank 0"
            )
    bad = [(rank, key) for rank, (_, _, keys) in enumerate(reports) for key in keys]
    if bad:
        rank, key = bad[0]
        raise NumericsError(
            f"tensor {key} on rank {rank} is not finite ({len(bad)} shards in all); "
            "not saved, so that the checkpoints stay good"
        )
    if len({theirs for _, theirs, _ in reports}) > 1:
        raise NumericsError(_first_difference(peers.gather(plain)))
    return entries


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys whose local shard holds NaN or infinity; one device-to-host copy per device.

    The extremes carry both (NaN wins every comparison of aminmax) and take one pass over the data
    without a temporary: a seventh of the time of `isfinite().all()` on a CPU.
    """
    extremes: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        shard = local_shard(value)
        if shard.is_floating_point() and shard.numel():
            lowest, highest = torch.aminmax(shard)
            both = torch.stack((lowest, highest)).double()
            extremes.setdefault(shard.device, []).append((key, both))
    bad = []
    for named in extremes.values():
        finite = torch.stack([both for _, both in named]).isfinite().all(dim=1).tolist()
        bad += [key for (key, _), good in zip(named, finite, strict=True) if not good]
    return sorted(bad)


def _plain_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes of the values of the tensors that are no DTensors: buffers and counters, small."""
    digests = {}
    for key, value in tensors.items():
        if not isinstance(value, DTensor):
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digests[key] = sha256(bits.numpy().data).hexdigest()
    return digests


def _first_difference(digests: list[dict[str, str]]) -> str:
    rank, key = next(
        (rank, key)
        for rank, theirs in enumerate(digests)
        for key, digest in sorted(theirs.items())
        if digest != digests[0][key]
    )
    return (
        f"plain tensor {key} on rank {rank} differs from rank 0's: only one of them would be "
        "saved; replicas have come apart, or it is per-rank state and needs a key per rank"
    )

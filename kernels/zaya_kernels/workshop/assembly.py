"""What a compiled kernel uses, read from its gfx942 or gfx950 assembly.

Counts are of one wave's instructions in the hot loop: of the innermost loops the one with the most
matrix instructions (of those, the fewest vector instructions; the most where no loop has matrix
instructions), or the whole kernel where it has no loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^(?:\.L|; %)(BB\w+|bb\.\d+):")
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)")

REGISTERS_PER_LANE = 512
REGISTER_GRANULE = 8
MAX_WAVES = 8
SIMDS = 4
LDS_BYTES = {"gfx942": 65536, "gfx950": 163840}


@dataclass(frozen=True)
class LoopCounts:
    """Instructions of one wave in the hot loop."""

    matrix: int
    vector: int
    wide_loads: int
    """16 bytes a lane, through buffer instructions."""
    narrow_loads: int
    """Any other load from memory."""
    wide_stores: int
    narrow_stores: int
    lds_reads: int
    narrow_lds_reads: int
    """Of fewer than 64 bits a lane."""
    lds_writes: int
    barriers: int
    accumulator_moves: int
    scratch: int


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel; NVIDIA kernels have registers, stack and shared memory only."""

    registers: int
    """Per lane; on gfx942 and gfx950 accumulation registers included."""
    accumulation_registers: int
    vector_spills: int
    scalar_spills: int
    scratch_bytes: int
    """Per lane; the stack on NVIDIA."""
    lds_bytes: int
    num_warps: int
    waves: int
    """Waves per SIMD (AMD) or warps per multiprocessor (NVIDIA) that fit at once."""
    loop: LoopCounts | None


def amd_resources(text: str, lds_bytes: int, num_warps: int, arch: str) -> Resources:
    """Resources of a kernel from its assembly and its dynamic LDS use."""
    registers = _metadata(text, "vgpr_count")
    return Resources(
        registers=registers,
        accumulation_registers=_metadata(text, "agpr_count"),
        vector_spills=_metadata(text, "vgpr_spill_count"),
        scalar_spills=_metadata(text, "sgpr_spill_count"),
        scratch_bytes=_metadata(text, "private_segment_fixed_size"),
        lds_bytes=lds_bytes,
        num_warps=num_warps,
        waves=waves_per_simd(registers, lds_bytes, num_warps, arch),
        loop=count(hot_loop(text)),
    )


def waves_per_simd(registers: int, lds_bytes: int, num_warps: int, arch: str) -> int:
    """Waves that fit on one SIMD: whole workgroups, by registers and by LDS."""
    granules = -(-max(registers, 1) // REGISTER_GRANULE) * REGISTER_GRANULE
    by_registers = min(MAX_WAVES, REGISTERS_PER_LANE // granules)
    groups = by_registers * SIMDS // num_warps
    if lds_bytes:
        groups = min(groups, LDS_BYTES[arch] // lds_bytes)
    return groups * num_warps // SIMDS


def nvidia_resources(usage: str, lds_bytes: int, num_warps: int) -> Resources:
    """Resources from what `cuobjdump --dump-resource-usage` prints."""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    registers, stack = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
    per_warp = -(-registers * 32 // 256) * 256
    groups = min(64 // num_warps, 65536 // (per_warp * num_warps))
    if lds_bytes:
        groups = min(groups, 233472 // (lds_bytes + 1024))
    return Resources(registers, 0, 0, 0, stack, lds_bytes, num_warps, groups * num_warps, None)


def _metadata(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    if found is None:
        raise ValueError(f"no .{key} in the assembly")
    return int(found.group(1))


def instructions(lines: list[str]) -> list[str]:
    """The instruction lines, without labels, directives and comments."""
    return [line.split(";")[0].rstrip() for line in lines if _INSTRUCTION.match(line)]


def _blocks(text: str) -> list[tuple[str, str, list[str]]]:
    """(label, what LLVM's comments say about loops, lines) of every basic block."""
    blocks: list[tuple[str, str, list[str]]] = []
    for line in text.splitlines():
        start = _BLOCK.match(line)
        if start:
            blocks.append((start.group(1), line.partition(";")[2], []))
        elif blocks:
            label, comment, lines = blocks[-1]
            if not lines and line.lstrip().startswith(";"):
                blocks[-1] = (label, comment + line, lines)
            else:
                lines.append(line)
    return blocks


def loops(text: str) -> list[list[str]]:
    """Lines of every innermost loop, by LLVM's own comments: a branch backwards alone need not
    close a loop."""
    blocks = _blocks(text)
    found = []
    for label, comment, lines in blocks:
        if "Inner Loop Header" not in comment:
            continue
        inside = re.compile(rf"in Loop: Header={label} ")
        members = [more for _, about, more in blocks if inside.search(about + " ")]
        found.append([*lines, *(line for member in members for line in member)])
    return found


def hot_loop(text: str) -> list[str]:
    """Instructions of the loop that the kernel spends its time in, or of the whole kernel.

    Of two loops with the same products the one with a mask is at an edge, so the other counts.
    """
    found = [instructions(loop) for loop in loops(text)]
    if not found:
        return instructions(text.splitlines())
    most = max(_number(loop, r"v_mfma") for loop in found)
    if most == 0:
        return max(found, key=lambda loop: _number(loop, r"v_"))
    equal = [loop for loop in found if _number(loop, r"v_mfma") == most]
    return min(equal, key=lambda loop: _number(loop, r"v_"))


def _number(lines: list[str], pattern: str) -> int:
    return sum(re.match(rf"\s+{pattern}", line) is not None for line in lines)


def count(lines: list[str]) -> LoopCounts:
    """Counts of a list of instructions."""
    reads = _number(lines, r"ds_(read|load)")
    wide_reads = _number(lines, r"ds_(read|load)\w*_b(64|96|128)") + _number(
        lines, r"ds_(read|load)2(st64)?_b32"
    )
    matrix, moves = _number(lines, r"v_mfma"), _number(lines, r"v_accvgpr_")
    wide_loads = _number(lines, r"buffer_load_dwordx4")
    wide_stores = _number(lines, r"buffer_store_dwordx4")
    return LoopCounts(
        matrix=matrix,
        vector=_number(lines, r"v_") - matrix - moves,
        wide_loads=wide_loads,
        narrow_loads=_number(lines, r"(buffer|global|flat)_load") - wide_loads,
        wide_stores=wide_stores,
        narrow_stores=_number(lines, r"(buffer|global|flat)_store") - wide_stores,
        lds_reads=reads,
        narrow_lds_reads=reads - wide_reads,
        lds_writes=_number(lines, r"ds_(write|store)"),
        barriers=_number(lines, r"s_barrier"),
        accumulator_moves=moves,
        scratch=_number(lines, r"scratch_"),
    )

#!/usr/bin/env python3
"""Counts how often the hot kernels' accesses to shared memory meet a bank twice.

    scripts/bank-conflicts.py

Each line of ACCESSES is what a warp's 32 lanes address in one instruction, by the same arithmetic as the kernel's source (named
with it). Told are its passes through the 32 banks of 4 bytes, and how many are unavoidable. Lanes go together as many as fit 128
bytes: 8 of 16 bytes, and the 8 rows of each matrix of a matrix load; lanes that read the same word share it. Exit code 1 if an
access that is not known to be so takes more passes than it must.
"""
import sys

LANES = range(32)


def passes(addresses, width):
    """Passes, and the fewest that as many distinct bytes could take."""
    together = min(32, 128 // width)
    taken = fewest = 0
    for first in range(0, 32, together):
        words = {a // 4 + i for a in addresses[first : first + together] if a is not None for i in range(width // 4)}
        banks = [word % 32 for word in words]
        taken += max((banks.count(bank) for bank in set(banks)), default=0)
        fewest += -(-len(words) // 32)
    return taken, fewest


# ---- rt/gemm.cuh, rt/operands.cuh, rt/nf4_operand.cuh ----


def tile(cols, row, part):
    """tile_offset, in bytes."""
    parts = cols // 8
    rows_per_128 = 8 // parts if parts < 8 else 1
    return (row * cols + (part ^ row // rows_per_128 % min(parts, 8)) * 8) * 2


def gemm(extent, threads):
    """Accesses of a tile of `extent` rows (columns) by `threads` threads: deep rows of 64, and 64 rows along the tile."""
    for name, along in (("", False), (" along rows", True)):
        cols = extent if along else 64
        row_parts = cols // 8
        if along:
            yield f"load_a{name}", [tile(cols, l // 16 * 8 + l % 8, l // 8 % 2) for l in LANES], 16
            yield f"load_b{name}", [tile(cols, l % 16, l // 16) for l in LANES], 16
        else:
            yield "load_a", [tile(cols, l % 16, l // 16) for l in LANES], 16
            yield "load_b", [tile(cols, l // 16 * 8 + l % 8, l // 8 % 2) for l in LANES], 16
        yield f"copies, stores of rows{name}", [tile(cols, l // row_parts, l % row_parts) for l in LANES], 16
        rows = 64 if along else extent
        if extent >= 64:
            piece = rows * cols // threads // 8
            yield f"NF4 stores{name}", [tile(cols, l % rows, l // rows * piece) for l in LANES], 16


# ---- rt/attention.cuh, rt/delta.cuh: rows with 8 elements of padding ----


def padded(columns):
    stride = (columns + 8) * 2
    yield "load_matrix, A", [l % 16 * stride + l // 16 * 16 for l in LANES], 16
    yield "load_matrix, B", [(l // 16 * 8 + l % 8) * stride + l // 8 % 2 * 16 for l in LANES], 16
    yield "write_fragments, store_strip", [l // 4 * stride + l % 4 * 4 for l in LANES], 4
    yield "copies, copy_out", [l // (columns // 8) * stride + l % (columns // 8) * 16 for l in LANES], 16


# ---- gated_delta.cu ----

SOLVE_ROW = 68 * 4


def prepare():
    stride = (128 + 8) * 2
    yield "row_rstd", [l % 16 * stride + l // 16 * 16 for l in LANES], 16
    yield "L to the solver", [l % 4 * 2 * SOLVE_ROW + l // 4 * 4 for l in LANES], 4
    yield "solver, L of a row", [l // 16 * 32 for l in LANES], 16
    yield "solver, a column's element", [l % 16 * 4 for l in LANES], 4
    yield "solver, two columns' elements", [(l // 16 * 8 * SOLVE_ROW) + l % 16 * 4 for l in LANES], 4
    yield "scale_inverse, load", [l * 8 for l in LANES], 8
    yield "scale_inverse, store", [l * 4 for l in LANES], 4


TILES = [(128, 128), (128, 256), (256, 256), (64, 128), (16, 128)]
ACCESSES = [
    *((f"tile of {extent} by {threads} threads", gemm(extent, threads)) for extent, threads in TILES),
    *((f"padded rows of {columns}", padded(columns)) for columns in (64, 96, 128, 256)),
    ("gated_delta_prepare", prepare()),
]
# What is known and left, with the reason in docs/kernels.md.
KNOWN = {
    ("gated_delta_prepare", "solver, two columns' elements"),
    ("padded rows of 96", "copies, copy_out"),
}


def main():
    bad = 0
    for place, accesses in ACCESSES:
        for name, addresses, width in accesses:
            taken, fewest = passes(addresses, width)
            note = "" if taken == fewest else "  known" if (place, name) in KNOWN else "  CONFLICT"
            bad += note == "  CONFLICT"
            print(f"{place:28} {name:32} {width:3} bytes a lane: {taken} passes of {fewest}{note}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

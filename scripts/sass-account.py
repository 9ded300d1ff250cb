#!/usr/bin/env python3
"""Counts the instructions of kernels' main loops, from their SASS.

    scripts/sass-account.py FATBIN [KERNEL ...]

FATBIN is a file of target/kernels; without kernels all of it are told. Needs cuobjdump (CUDA toolkit, or PyPI's nvidia-cuda-cuobjdump
and nvidia-cuda-nvdisasm) on PATH. Of each kernel: its instructions, those on local memory (spills), and of every loop that
multiplies on tensor cores what a warp issues each time round: HMMA, matrix loads, shared and global accesses by width, barriers, all others.
A loop is what lies between a backward branch and its target; loops inside it are told apart and count in it once.
"""
import collections
import re
import subprocess
import sys

ARCH = "sm_90a"
KINDS = [
    ("HMMA", r"HMMA"),
    ("LDSM", r"LDSM"),
    ("LDGSTS", r"LDGSTS"),
    ("LDG.128", r"LDG\S*\.128"),
    ("LDG.64", r"LDG\S*\.64"),
    ("LDG", r"LDG"),
    ("STG", r"STG"),
    ("LDS.128", r"LDS\S*\.128"),
    ("LDS.64", r"LDS\S*\.64"),
    ("LDS", r"LDS"),
    ("STS.128", r"STS\S*\.128"),
    ("STS.64", r"STS\S*\.64"),
    ("STS", r"STS"),
    ("local", r"LDL|STL"),
    ("params", r"LDC|ULDC"),
    ("BAR", r"BAR|DEPBAR|LDGDEPBAR|WARPSYNC"),
    ("PRMT", r"PRMT"),
    ("convert", r"F2F|F2FP|I2F|F2I"),
    ("float", r"FADD|FMUL|FFMA|FSEL|FSETP|FMNMX|HADD|HMUL|HFMA|MUFU"),
    ("integer", r"U?IADD|U?IMAD|U?LEA|U?LOP|U?SHF|U?ISETP|U?SEL|U?SGXT|U?IMNMX|VIADD|U?MOV|R2UR|S2R"),
    ("branch", r"BRA|BSSY|BSYNC|EXIT|CALL|RET"),
]


def kernels(text):
    """Name and instructions (address, text) of every function of ARCH."""
    found, arch, name = {}, None, None
    for line in text.splitlines():
        if match := re.search(r"^\s*(?:arch = |code for )(sm_\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\S+)", line):
            name = match.group(1)
            if arch == ARCH:
                found[name] = []
        elif (match := re.search(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)) and arch == ARCH:
            found[name].append((int(match.group(1), 16), match.group(2)))
    return found


def opcode(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def kind(text):
    code = opcode(text)
    return next((name for name, pattern in KINDS if re.match(pattern, code)), "other")


def loops(instructions):
    """Ranges of addresses between a backward branch and its target, innermost first."""
    found = set()
    for address, text in instructions:
        match = re.search(r"\bBRA\S*\s+(?:\S+,\s*)?`?\(?\.?(?:L_x_\d+|0x([0-9a-f]+))", text)
        if match and match.group(1) and int(match.group(1), 16) < address:
            found.add((int(match.group(1), 16), address))
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def account(name, instructions):
    total = collections.Counter(kind(text) for _, text in instructions)
    print(f"{name}: {len(instructions)} instructions, {total['local']} on local memory")
    for start, end in loops(instructions):
        inside = [text for address, text in instructions if start <= address <= end]
        counts = collections.Counter(kind(text) for text in inside)
        if counts["HMMA"] == 0:
            continue
        order = [name for name, _ in KINDS] + ["other"]
        told = ", ".join(f"{counts[name]} {name}" for name in order if counts[name])
        print(f"  {start:#06x} to {end:#06x}: {len(inside)} a time, {len(inside) / counts['HMMA']:.1f} for each HMMA: {told}")


def main():
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    fatbin, wanted = sys.argv[1], sys.argv[2:]
    text = subprocess.run(["cuobjdump", "-sass", fatbin], capture_output=True, text=True, check=True).stdout
    found = kernels(text)
    unknown = [name for name in wanted if name not in found]
    if unknown or not found:
        raise SystemExit(f"{fatbin}: no {', '.join(unknown) or ARCH} in it; it has {', '.join(found) or 'nothing'}")
    for name in wanted or found:
        account(name, found[name])


if __name__ == "__main__":
    main()

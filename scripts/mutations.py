#!/usr/bin/env python3
"""Breaks each kernel on purpose, one line at a time, and expects a test of the emulated device to fail.

    scripts/mutations.py [FAMILY ...]

A mutation is a line of scripts/mutations/FAMILY.txt: file, what is broken, text (once in the file), replacement, filter of
tests/selftest.rs; separated by tabs. What caught what goes to docs/mutations.md when every family ran. Exit code 1 if one
was not caught. Files are put back as they were.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LISTS = ROOT / "scripts" / "mutations"
TABLE = ROOT / "docs" / "mutations.md"
HEADER = """# Mutations

Each kernel was broken on purpose, one line at a time, and the cases of `tests/selftest.rs` were run on the emulated device
(`scripts/mutations.py`, which wrote this list). Caught by: the first failure.

| kernel | broken | caught by |
|---|---|---|
"""


def run(test_filter):
    command = ["cargo", "test", "--locked", "--test", "selftest", test_filter]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    said = result.stdout + result.stderr
    if "error: could not compile" in said or "error: failed to run custom build command" in said:
        raise SystemExit(f"a mutation does not compile:\n{said[-3000:]}")
    failure = re.search(r"^(?:cpu|emu)[^\n]*", said, re.MULTILINE)
    return result.returncode, failure.group(0) if failure else said.strip().splitlines()[-1]


def mutate(line):
    name, what, old, new, test_filter = line.rstrip("\n").split("\t")
    path = ROOT / name
    text = path.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{name}: `{old}` is there {text.count(old)} times, expected once")
    try:
        path.write_text(text.replace(old, new))
        code, failure = run(test_filter)
    finally:
        path.write_text(text)
    is_caught = code != 0
    print("caught" if is_caught else "MISSED", name, what, "--", failure[:160], flush=True)
    return is_caught, f"| `{name.removeprefix('kernels/')}` | {what} | {failure[:200].replace('|', '/')} |\n"


def main():
    wanted = sys.argv[1:]
    lists = [path for path in sorted(LISTS.glob("*.txt")) if not wanted or path.stem in wanted]
    lines = [line for path in lists for line in path.read_text().splitlines() if line and not line.startswith("#")]
    results = [mutate(line) for line in lines]
    if not wanted:
        TABLE.write_text(HEADER + "".join(row for _, row in results))
    missed = sum(not is_caught for is_caught, _ in results)
    print(f"{len(results) - missed} of {len(results)} mutations caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Breaks each kernel on purpose, one line at a time, and expects a test of the emulated device to fail.

    scripts/mutations.py [FAMILY ...]

A mutation is a line of scripts/mutations/FAMILY.txt: file, what is broken, text (once in the file), replacement, filter of
tests/selftest.rs; separated by tabs. What caught what goes to docs/mutations.md when every family ran. Exit code 1 if one
was not caught. Files are put back as they were.
"""
import os
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


def cargo(*arguments):
    command = ["cargo", "test", "--locked", "--test", "selftest", *arguments]
    # What a broken kernel no longer uses is no reason not to compile it.
    env = os.environ | {"CXXFLAGS": "-w"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    return result.returncode, result.stdout + result.stderr


class Mutation:
    def __init__(self, family, line):
        self.family = family
        self.name, self.what, self.old, self.new, self.filter = line.split("\t")
        self.path = ROOT / self.name
        found = self.path.read_text().count(self.old)
        if found != 1:
            raise SystemExit(f"{self.name}: `{self.old}` is there {found} times, expected once")

    def shares_code(self):
        """What other families' kernels use too."""
        return "/rt/" in self.name or self.path.suffix != ".cu" or self.path.name == "nf4.cu"

    def check(self):
        """Runs the filter on the build there is: whether it fails, and with what."""
        code, said = cargo(self.filter)
        if "running 0 tests" in said:
            raise SystemExit(f"{self.name}: no test is called `{self.filter}`")
        failure = re.search(r"^(?:cpu|emu)[^\n]*", said, re.MULTILINE)
        text = failure.group(0) if failure else said.strip().splitlines()[-1]
        is_caught = code != 0
        print("caught" if is_caught else "MISSED", self.name, self.what, "--", text[:160], flush=True)
        name = self.name.removeprefix("kernels/")
        return is_caught, f"| `{name}` | {self.what} | {text[:200].replace('|', '/')} |\n"


def batches(mutations):
    """Mutations of different families' own kernels, which one build can hold together."""
    left = list(mutations)
    while left:
        batch = []
        for mutation in list(left):
            apart = all(mutation.family != other.family and mutation.name != other.name for other in batch)
            alone = mutation.shares_code()
            if not batch or (apart and not alone and not batch[0].shares_code()):
                batch.append(mutation)
                left.remove(mutation)
        yield batch


def try_batch(batch):
    originals = {mutation.path: mutation.path.read_text() for mutation in batch}
    try:
        for mutation in batch:
            mutation.path.write_text(originals[mutation.path].replace(mutation.old, mutation.new))
        code, said = cargo("--no-run")
        if code != 0:
            raise SystemExit(f"a mutation of {[m.name for m in batch]} does not compile:\n{said[-3000:]}")
        return [mutation.check() for mutation in batch]
    finally:
        for path, text in originals.items():
            path.write_text(text)


def main():
    wanted = sys.argv[1:]
    lists = [path for path in sorted(LISTS.glob("*.txt")) if not wanted or path.stem in wanted]
    mutations = [
        Mutation(path.stem, line)
        for path in lists
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    results = [result for batch in batches(mutations) for result in try_batch(batch)]
    if not wanted:
        TABLE.write_text(HEADER + "".join(row for _, row in results))
    missed = sum(not is_caught for is_caught, _ in results)
    print(f"{len(results) - missed} of {len(results)} mutations caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

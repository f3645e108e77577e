"""Make one-line changes to the package, one at a time in a copy, and name those that no test notices. Not in CI.

python tests/mutate.py            # all of tests/mutations.json: [file, old text, new text, test file]
python tests/mutate.py losses     # those whose file name holds the word
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def survives(copy: Path, file: str, old: str, new: str, test: str) -> bool:
    """Return whether the tests pass with the change."""
    path, before = copy / file, (ROOT / file).read_text()
    if old not in before:
        raise ValueError(f"{file} does not hold {old!r}: mend tests/mutations.json")
    path.write_text(before.replace(old, new, 1))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=copy, capture_output=True)
    path.write_text(before)
    return done.returncode == 0


def main() -> int:
    """Try all, and print the survivors."""
    words, tried, alive = sys.argv[1:], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "kaggle", "notebooks")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in json.loads((ROOT / "tests" / "mutations.json").read_text()):
            if not words or any(word in mutation[0] for word in words):
                tried += 1
                if survives(copy, *mutation):
                    alive += 1
                    print("SURVIVES", *mutation, sep=" | ", flush=True)
    print(f"{tried - alive} of {tried} changes noticed")
    return int(alive > 0.05 * tried)


if __name__ == "__main__":
    sys.exit(main())

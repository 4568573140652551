"""The own tests of packages that use torch.func, with torch's transforms and with autodiff's: ``nox -s clients``.

Every test that passes with torch's has to pass with autodiff's. A package's tests come from its source archive, as the
package index has it; the archives of TensorDict, PyPose, TorchJD and Laplace hold none, and files here stand for
these. Both libraries take turns, and the time of a suite is that of the processor in its tests, the shorter of two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
LIBRARIES = ("torch", "autodiff")


class Client(NamedTuple):
    """A package: its name in the index, what pytest is given in the folder of its archive, or here, and how often.

    ``differences`` are tests in which autodiff is meant to differ, each with the reason. ``added`` are files that its
    archive leaves out, by their place there.
    """

    name: str
    arguments: tuple[str, ...]
    rounds: int = 2
    differences: dict[str, str] = {}  # noqa: RUF012  never written to
    added: dict[str, str] = {}  # noqa: RUF012
    archive: bool = True


CLIENTS = (
    Client(
        "curvlinops-for-pytorch",
        # Of 16,000 tests, those of the operators that call torch.func, without their longest cases.
        (
            *(f"test/test_{name}.py" for name in ("hessian", "ggn", "gradient_moments", "jacobian")),
            *("test/test__torch_base.py", "test/experimental"),
        ),
        rounds=1,
    ),
    Client(
        "posteriors",
        ("tests",),
        differences={
            "tests/test_utils.py::test_CatchAuxError": "it expects that an aux of None is refused, which autodiff allows"
        },
        added={"tests/scenarios.py": "posteriors_scenarios.py"},
    ),
    Client("zuko", ("tests",)),
    # Those that compare per-sample gradients with functorch's.
    Client(
        "opacus", ("opacus/tests/grad_samples", "opacus/tests/per_sample_gradients_utils_test.py"), rounds=1
    ),
    Client("tensordict", ("test_tensordict.py",), archive=False),
    Client("pypose", ("test_pypose.py",), archive=False),
    Client("torchjd", ("test_torchjd.py",), archive=False),
    Client("laplace-torch", ("test_laplace.py",), archive=False),
)


class Outcome(NamedTuple):
    """What became of the tests of a suite: those that passed, all of them, and the processor's time in seconds."""

    passed: set[str]
    tests: set[str]
    seconds: float


def unpacked(client: Client, folder: Path) -> Path:
    """The folder of the package's source archive, fetched and unpacked, with the files that it leaves out."""
    if not client.archive:
        return HERE
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", client.name]
    subprocess.run([*command, "-d", str(archives), f"{client.name}=={version(client.name)}"], check=True)
    (archive,) = archives.glob(f"{client.name.replace('-', '_')}-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    root = folder / archive.name.removesuffix(".tar.gz")
    for place, source in client.added.items():
        (root / place).write_text((HERE / source).read_text())
    return root


def run(client: Client, root: Path, library: str, result: Path) -> Outcome:
    """The suite with one library's transforms."""
    # The tests are of the archive, and the package is the one that is installed.
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    env = os.environ | {"CLIENTS_LIBRARY": library, "CLIENTS_RESULT": str(result), "PYTHONPATH": paths}
    options = [
        "-q",
        "-p",
        "swap",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "--continue-on-collection-errors",
    ]
    # No settings of this project's, in whose folder the archive may lie.
    settings = ["-c", os.devnull, "--rootdir", str(root)] if client.archive else []
    command = [sys.executable, "-m", "pytest", *options, *settings, *client.arguments]
    result.unlink(missing_ok=True)
    subprocess.run(command, cwd=root, env=env, check=False)
    found = json.loads(result.read_text())
    outcomes, seconds = found["outcomes"], found["seconds"]
    passed = {test for test, outcome in outcomes.items() if outcome == "passed"}
    return Outcome(passed, set(outcomes), sum(seconds[test] for test in passed))


def compare(client: Client, folder: Path) -> tuple[str, set[str]]:
    """A line of the table, and the tests that pass with torch's transforms alone."""
    root = unpacked(client, folder)
    runs: dict[str, list[Outcome]] = {library: [] for library in LIBRARIES}
    for _ in range(client.rounds):
        for library in LIBRARIES:
            runs[library].append(run(client, root, library, folder / "result.json"))
    torch, ours = (runs[library][0] for library in LIBRARIES)
    fastest = [min(one.seconds for one in runs[library]) for library in LIBRARIES]
    lost = torch.passed - ours.passed - set(client.differences)
    name = f"{client.name} {version(client.name)}" + ("" if client.archive else ", tests of ours")
    counts = f"{len(torch.tests)} | {len(torch.passed)} | {len(ours.passed)}"
    return f"| {name} | {counts} | {fastest[1] / fastest[0]:.2f} |", lost


def main() -> int:
    """Run the suites that are named, or all, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("clients", nargs="*", help="; ".join(client.name for client in CLIENTS))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines, lost = [], set()
    for client in CLIENTS:
        if not options.clients or client.name in options.clients:
            line, missing = compare(client, options.folder)
            lines.append(line)
            lost |= {f"{client.name}: {test}" for test in missing}
    header = ["| client | tests | pass on torch | pass on autodiff | time |", "|---|---|---|---|---|"]
    sys.stdout.write("\n".join([*header, *lines, ""]))
    for test in sorted(lost):
        sys.stdout.write(f"passes on torch alone: {test}\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

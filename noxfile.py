"""Every check of this project, each in its own environment.

``nox`` runs what CI runs. ``nox -s demo`` shows the main use; ``nox -l`` lists the sessions.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
# pip uses the package sources configured on the machine; uv would not.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "ops", "docs"]

CONSTRAINTS = Path("constraints.txt")
# One thread per process: the test processes share the cores, and more threads would disturb timings.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WORKERS = str(min(os.cpu_count() or 1, 8))


def install(session: nox.Session, *what: str) -> None:
    """Install with the pinned versions."""
    session.install(*what, "-c", str(CONSTRAINTS))


@nox.session
def demo(session: nox.Session) -> None:
    """Compute the Hessian of the loss for every digit, with the package as users install it."""
    install(session, ".[examples]")
    both = [["--parameters", "last"], ["--parameters", "all"]]
    for options in [session.posargs] if session.posargs else both:
        session.run("python", "examples/per_sample_hessians.py", *options, env=ONE_THREAD)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, and every example in docstrings, README and docs."""
    install(session, "-e", ".[tests]")
    run_tests(session)


@nox.session
def ops(session: nox.Session) -> None:
    """Compare with torch.func on torch's own operator database."""
    install(session, "-e", ".[tests]")
    session.run("pytest", "-n", WORKERS, "tests/ops", *session.posargs, env=ONE_THREAD)


@nox.session
def soak(session: nox.Session) -> None:
    """Check 20,000 random compositions of transforms, and that they leave nothing behind: about ten minutes.

    Then interrupt 10,000 calls, unless arguments say what to run.
    """
    install(session, "-e", ".[tests]")
    session.run("python", "tests/soak", *session.posargs, env=ONE_THREAD)
    if not session.posargs:
        session.run("python", "tests/soak", "--interrupts", "10000", env=ONE_THREAD)


@nox.session
def clients(session: nox.Session) -> None:
    """Run the own tests of packages that use torch.func, with torch's transforms and with autodiff's: 15 minutes.

    ``-- zuko pypose`` runs those that are named.
    """
    needed = ("curvlinops-for-pytorch", "posteriors", "zuko", "opacus", "tensordict", "pypose", "torchjd")
    tests = ("torchopt", "hypothesis", "matplotlib", "scikit-learn", "pandas")
    install(session, ".[tests]", *needed, "laplace-torch", *tests)
    # PyPose installs it, for a torch with CUDA; what imports it here does without.
    session.run("pip", "uninstall", "--yes", "--quiet", "torchvision")
    folder = Path(session.create_tmp())
    session.run("python", "tests/clients", "--folder", str(folder), *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, docstrings, and which files use private parts of torch or import optree."""
    install(session, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the package's types, strictly, and those that a user's code sees."""
    install(session, "-e", ".[types]", "pytest")
    session.run("mypy", *session.posargs)
    session.run("pytest", "tests/test_types.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in docs/_build, run every tutorial and check internal links; warnings are errors."""
    install(session, "-e", ".[docs]")
    options = ["-W", "--keep-going", "-n", "-q", *session.posargs]
    session.run("sphinx-build", *options, "docs", "docs/_build", env=ONE_THREAD)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare time and memory with torch and raw autograd.

    ``-- --full`` adds compiled code, JAX, and operators beside curvlinops; ``-- --before COMMIT`` compares with the
    package as it was there.
    """
    install(session, "-e", ".[examples]")
    if "--full" in session.posargs:
        install(session, "curvlinops-for-pytorch")
        # BackPACK installs it, for a torch with CUDA; what imports it here does without.
        session.run("pip", "uninstall", "--yes", "--quiet", "torchvision")
    full = ["--jax", jax_python(session)] if "--full" in session.posargs else []
    session.run("python", "-m", "benchmarks", *session.posargs, *full, env=ONE_THREAD)


def jax_python(session: nox.Session) -> str:
    """The Python of an environment with JAX and without this project; empty if JAX cannot be installed."""
    folder = Path(session.create_tmp()) / "jax"
    python = folder / "bin" / "python"
    session.run("python", "-m", "venv", str(folder), silent=True)
    command = [str(python), "-m", "pip", "install", "jax", "-c", str(CONSTRAINTS)]
    session.run(*command, external=True, success_codes=[0, 1])
    return str(python) if any(folder.glob("lib/*/site-packages/jax")) else ""


@nox.session
@nox.parametrize("torch", ["2.11.0", "2.15.0"])
def torch_versions(session: nox.Session, torch: str) -> None:
    """Run the tests with the oldest and the newest torch; run it by hand, since it downloads several GB."""
    # Each torch has its own bounds on setuptools; all other pins apply.
    freed = ("torch==", "setuptools==")
    pins = [pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith(freed)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*pins, f"torch=={torch}", ""]))
    session.install("-e", ".[tests]", "-c", str(constraints))
    run_tests(session)


@nox.session
def unneeded_fixes(session: nox.Session) -> None:
    """Say which fixes of torch's mistakes the newest torch has made unnecessary: by hand, for it fetches several GB."""
    pins = [
        pin for pin in CONSTRAINTS.read_text().splitlines() if not pin.startswith(("torch==", "setuptools=="))
    ]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join([*pins, ""]))
    session.install("-e", ".[tests]", "torch", "-c", str(constraints))
    session.run("python", "tests/torch_fixes/unneeded.py", env=ONE_THREAD)


def run_tests(session: nox.Session) -> None:
    """Run the tests without the operator matrix, which has its own session."""
    session.run("pytest", "-n", WORKERS, "--ignore=tests/ops", *session.posargs, env=ONE_THREAD)

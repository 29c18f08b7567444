"""What is shipped: the wheel's contents and metadata, the pinned set, Python 3.12, and a light `import upge`."""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("upge", "algorithms", "experiments")
HEAVY = ("deepspeed", "vllm", "transformers", "math_verify", "matplotlib")


def shipped(pattern: str = "*") -> list[str]:
    """The files of the packages in the tree whose names match `pattern`, as paths from the root."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob(pattern) if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    return sorted(name for name in names if "/." not in name and "/__pycache__/" not in name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The built wheel. It is built from a copy, so that no build/ folder appears in the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_sources_configurations_and_the_model(wheel: zipfile.ZipFile) -> None:
    wanted = set(shipped())
    assert {"upge/__init__.py", "algorithms/hpt.yaml", "experiments/report/report.html.j2"} <= wanted
    missing = sorted(wanted - set(wheel.namelist()))
    assert not missing, f"not in the wheel; an __init__.py is missing, or a suffix in pyproject.toml: {missing}"


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    strangers = [name for name in wheel.namelist() if not name.startswith((*(f"{p}/" for p in PACKAGES), "upge-"))]
    assert not strangers
    (licence,) = (name for name in wheel.namelist() if name.endswith("/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()


def test_wheel_has_the_program(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "upge = experiments.cli:main" in wheel.read(name).decode().splitlines()


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "upge"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    pythons = SpecifierSet(metadata["Requires-Python"])
    assert [minor for minor in range(9, 16) if f"3.{minor}.0" in pythons] == [11, 12]
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {need.name for need in needs if need.marker is None} == {"torch", "omegaconf", "jaxtyping"}


def test_ranges_admit_the_pinned_set(metadata: email.message.Message) -> None:
    pinned = {need.name.lower().replace("_", "-"): need for need in pins("cpu")}
    checked = []
    for need in map(Requirement, metadata.get_all("Requires-Dist")):
        pin = pinned.get(need.name.lower().replace("_", "-"))
        if pin:
            checked.append(need.name)
            assert need.specifier.contains(pin_version(pin)), f"{need} in pyproject.toml, {pin} in requirements/cpu.txt"
    assert {"torch", "deepspeed", "transformers", "math-verify", "pytest"} <= set(checked)


def pins(name: str) -> list[Requirement]:
    """The requirements in requirements/{name}.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pin_version(need: Requirement) -> Version:
    """The one version that a pinned requirement allows."""
    (specifier,) = need.specifier
    assert specifier.operator == "==", f"not pinned: {need}"
    return Version(specifier.version)


def test_environment_is_the_pinned_set() -> None:
    stamp = Path(sys.prefix) / "upge-stamp"
    if not stamp.exists() or "engine=cpu" not in stamp.read_text().splitlines():
        pytest.skip("this Python is not an environment that make env made from requirements/cpu.txt")
    wanted = {need.name: pin_version(need) for need in pins("cpu") if need.marker is None or need.marker.evaluate()}
    actual = {name: Version(Version(version(name)).public) for name in wanted}
    assert actual == wanted


def test_pins_are_plain_versions() -> None:
    assert len(pins("cpu")) > 100
    local = [str(need) for need in pins("cpu") if pin_version(need).local]
    assert not local, f"a local version such as 2.13.0+cpu is found on one index only: {local}"


def python312() -> str | Path | None:
    """A Python 3.12 that starts, on the PATH or among pyenv's; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    program = "import sys; print(sys.version_info[:2])"
    for candidate in filter(None, [shutil.which("python3.12"), *sorted(pyenv.glob("versions/3.12.*/bin/python"))]):
        said = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
        if said.stdout.strip() == "(3, 12)":
            return candidate
    return None


@pytest.mark.parametrize("minor", [11, 12])
def test_sources_compile(minor: int) -> None:
    sources = [ROOT / path for path in shipped("*.py")] + [ROOT / "setup.py", *(ROOT / "examples").glob("*.py")]
    sources += (ROOT / "tests").rglob("*.py")
    interpreter = python312() if minor == 12 else sys.executable
    if interpreter is None:
        trees = [ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, minor)) for path in sources]
        assert len(trees) == len(sources) > len(PACKAGES)
        return
    program = (
        "import sys, pathlib\nfor name in sys.stdin.read().splitlines():\n"
        "    compile(pathlib.Path(name).read_text('utf-8'), name, 'exec')\n"
    )
    done = subprocess.run(
        [interpreter, "-W", "error", "-c", program], input="\n".join(map(str, sources)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_import_upge_is_light() -> None:
    program = f"import sys, upge; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

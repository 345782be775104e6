"""One lock for everyone: hashes, no host names, all of pyproject.toml in it, and environment.yml built on it."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from itertools import chain

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lowrank.io.dependencies import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
BLOCKS = re.findall(r"^(?=[a-z0-9])(.+?)(?=^[a-z0-9]|\Z)", LOCK, flags=re.MULTILINE | re.DOTALL)


def pins() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for block in BLOCKS:
        requirement = Requirement(block.splitlines()[0].removesuffix("\\").strip())
        found.setdefault(requirement.name.lower().replace("_", "-"), []).append(requirement)
    return found


def test_every_pin_is_exact_and_hashed() -> None:
    assert len(BLOCKS) > 150
    for block in BLOCKS:
        assert re.match(r"[a-z0-9._-]+==\S+", block), block[:80]
        assert "--hash=sha256:" in block, block[:80]


def test_the_lock_names_no_host_and_no_path() -> None:
    assert not re.findall(r"https?://|file:|--(?:extra-)?index-url|--find-links|\s/\w", LOCK)


def test_everything_the_project_asks_for_is_locked_to_a_fitting_version() -> None:
    asked = [*PROJECT["dependencies"], *chain.from_iterable(PROJECT["optional-dependencies"].values())]
    locked = pins()
    for requirement in map(Requirement, asked):
        if requirement.name != PROJECT["name"]:
            for pin in locked[requirement.name.lower()]:
                (exact,) = pin.specifier
                assert requirement.specifier.contains(exact.version), f"{requirement} against {pin}"


def test_packages_that_change_numbers_have_one_version_on_every_platform() -> None:
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "scipy",
        "pandas",
        "scikit-learn",
        "matplotlib",
        "tokenizers",
        "timm",
    ):
        assert len(pins()[name]) == 1, name


def test_this_environment_is_the_locked_one() -> None:
    checked = 0
    for name, requirements in pins().items():
        for pin in requirements:
            if pin.marker is None or pin.marker.evaluate():
                try:
                    (exact,) = pin.specifier
                    assert version(name) == exact.version, f"{name}: installed {version(name)}, locked {exact.version}"
                    checked += 1
                except PackageNotFoundError as error:
                    raise AssertionError(
                        f"{name} is locked and not installed: run `make test` for the set-up"
                    ) from error
    assert checked > 150


def test_conda_users_get_the_same_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python=") + ".0")
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-r requirements.lock"]

"""Versions of packages that fit each other, and what is said where they do not."""

import pytest
from package_metadata import install_metadata

from dpo_jax.parallel.versions import installed_version, mismatches

NEEDS = ("jaxlib<=0.12.0,>=0.12.0", 'libtpu==0.0.50.*; extra == "tpu"', 'jaxlib[k]==0.11; extra == "k"')
FITS = {"jaxlib": "0.12.0"}


@pytest.mark.parametrize(
    ("packages", "problem"),
    [(FITS | {"libtpu": "0.0.50.1"}, None),
     (FITS | {"libtpu": "0.0.50.2.dev20260101"}, None),
     (FITS | {"libtpu": "0.0.42.1"},
      "libtpu 0.0.42.1 is incompatible with a_jax 0.12.0, which requires ==0.0.50.*: pip install 'libtpu==0.0.50.*'"),
     (FITS | {"libtpu": "0.0.500"},
      "libtpu 0.0.500 is incompatible with a_jax 0.12.0, which requires ==0.0.50.*: pip install 'libtpu==0.0.50.*'"),
     ({"libtpu": "0.0.50.1", "jaxlib": "0.11"},
      ("jaxlib 0.11 is incompatible with a_jax 0.12.0, which requires <=0.12.0,>=0.12.0: "
       "pip install 'jaxlib<=0.12.0,>=0.12.0'"))],
    ids=str,
)  # fmt: skip
def test_a_version_outside_of_what_is_required_is_named(tmp_path, monkeypatch, packages, problem):
    install_metadata(tmp_path, "a_jax", "0.12.0", *NEEDS)
    for name, version in packages.items():
        install_metadata(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert mismatches("a_jax", ["tpu"]) == ([] if problem is None else [problem])


def test_what_is_missing_is_named_unless_it_is_optional(tmp_path, monkeypatch):
    needs = ("no_such_package>=2", 'no_such_extra==1; extra == "tpu"', 'no_such_system; sys_platform == "none"')
    install_metadata(tmp_path, "a_jax", "0.12.0", *needs)
    assert mismatches("a_jax") == ["a_jax is not installed: pip install a_jax"]
    assert installed_version("a_jax") is None
    monkeypatch.syspath_prepend(str(tmp_path))
    problem = "a_jax 0.12.0 needs no_such_package, which is missing: pip install 'no_such_package>=2'"
    assert mismatches("a_jax", ["tpu"]) == [problem]

"""What imports what, held by reading the sources; and what the README and pyproject.toml promise."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpo_jax"

# Imports point to lower floors only; rooms of one floor do not import each other, inside a room they may.
FLOORS = [
    {"errors", "batch"},
    {"config", "storage", "balance", "signals"},
    {"bucket"},
    {"bucket_cache"},
    {"parallel", "data", "losses"},
    {"console", "ops", "batching"},
    {"models", "logprobs"},
    {"step"},
    {"policy_gradient"},
    {"inference", "runs"},
    {"weights", "reports"},
    {"methods"},
    {"train", "plan"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# What foreign JAX programs import needs nothing of this program's models, data or training.
FOREIGN_FREE = {
    "batch": set(),
    "balance": {"batch"},
    "losses": {"balance", "batch", "config"},
    "logprobs": {"batch", "ops", "parallel"},
    "ops/softcap": set(),
    "ops/token_logps": {"batch", "ops", "parallel"},
    "parallel/sharding": {"config", "errors"},
    "step": {"balance", "batch", "config", "logprobs", "losses"},
    "policy_gradient": {"batch", "config", "step"},
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name under the package, and syntax tree, of every module but the package's own __init__."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Modules and folders right under the package that are imported; its version, from the package itself, is free."""
    named = {name.split(".")[1] for name in imports(tree) if name.startswith("dpo_jax.")}
    return named - {"__version__"}


def test_imports_point_down_the_floors():
    wrong = []
    for name, tree in sources():
        part = name.split(".")[0]
        assert part in FLOOR_OF, f"{name} has no floor: give it one, in FLOORS"
        for other in own_imports(tree):
            assert other in FLOOR_OF, f"{name} imports {other}, which is no module with a floor"
            if other != part and FLOOR_OF[other] >= FLOOR_OF[part]:
                wrong.append(f"{name} (floor {FLOOR_OF[part]}) imports {other} (floor {FLOOR_OF[other]})")
    assert not wrong, wrong


def test_the_map_has_these_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {name: int(floor) for floor, name in re.findall(r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE)}
    assert rooms == {name: floor for name, floor in FLOOR_OF.items() if name != "__main__"}


@pytest.mark.parametrize("module", FOREIGN_FREE)
def test_what_foreign_programs_import_stands_alone(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    assert own_imports(tree) <= FOREIGN_FREE[module]


WHOLE_CONFIGS = {"methods", "train", "plan", "commands", "cli", "config"}


def test_a_whole_config_stops_at_methods():
    """Below, a function takes one section or plain values, and does not ask which objective is trained."""
    for name, tree in sources():
        if name.split(".")[0] in WHOLE_CONFIGS:
            continue
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"DPOConfig", "SFTConfig", "TrainConfig"}, name
        compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)]
        assert not [text for text in compared if re.search(r"loss\.type\b|\.objective\b", text)], name


def test_the_loop_does_not_know_what_is_trained():
    text = (PACKAGE / "train.py").read_text()
    assert len(text.splitlines()) < 200
    words = set(re.findall(r"\w+", text.lower())) - {"dpoconfig", "sftconfig", "loss"}  # loss: in a docstring
    assert not {"dpo", "sft", "reference", "isinstance", "objective"} & words - {"dpo_jax"}


def test_config_is_standard_library_only():
    allowed = set(sys.stdlib_module_names) | {"dpo_jax"}
    trees = {name: tree for name, tree in sources() if name.split(".")[0] in ("errors", "config")}
    for name in ("config.file", "config.docs"):  # which config/__init__.py does not import
        del trees[name]
    for name, tree in trees.items():
        assert {imported.split(".")[0] for imported in imports(tree)} <= allowed
        assert own_imports(tree) <= {"errors", "config"}, name


@pytest.mark.parametrize(
    "modules",
    ["dpo_jax", "dpo_jax.cli, dpo_jax.config.docs", "dpo_jax.data.sources, dpo_jax.data.convert, dpo_jax.data.store"],
    ids=["package", "commands", "data"],
)
def test_no_jax_at_import(modules):
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_lazy_exports_are_the_real_things():
    import dpo_jax
    from dpo_jax import batch, step

    assert (dpo_jax.train_step, dpo_jax.make_train_step) == (step.train_step, step.make_train_step)
    assert (dpo_jax.TrainState, dpo_jax.PreferenceBatch, dpo_jax.PairLogps) == (
        step.TrainState,
        batch.PreferenceBatch,
        batch.PairLogps,
    )
    assert set(dpo_jax.__all__) <= set(dir(dpo_jax))
    with pytest.raises(AttributeError, match="no attribute 'trian_step'"):
        _ = dpo_jax.trian_step


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = requirement_names(extras["tracking"] + extras["gcs"])
    declared = requirement_names(project["dependencies"]) | optional
    distributions = packages_distributions()
    missing = set()
    for name, tree in sources():
        for module in {item.split(".")[0] for item in imports(tree)} - set(sys.stdlib_module_names) - {"dpo_jax"}:
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(module, [module])}
            if not owners & declared:
                missing.add(f"{name} imports {module}")
    assert not missing, missing


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    decisions = (ROOT / "docs" / "decisions.md").read_text().lower().replace("_", "-")
    unexplained = {name for name in requirement_names(project["dependencies"] + extras) if f"`{name}" not in decisions}
    assert not unexplained, unexplained


def test_every_tested_python_is_named_alike():
    """In pyproject.toml, in CI, and where the launch scripts and the image choose one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = [text.split(" :: ")[-1] for text in project["classifiers"] if text.startswith("Programming Language")]
    assert project["requires-python"] == f">={tested[0]}"
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    assert jobs["default"]["strategy"]["matrix"]["python"] == tested
    (both,) = [step["with"]["python-version"].split() for step in jobs["complete"]["steps"] if "with" in step]
    assert both == [tested[-1], tested[0]]
    (newest,) = re.findall(r"^newest=(.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert newest == tested[-1]
    (launched,) = re.findall(r"^PYTHON=(\S+)", (ROOT / "launch" / "env.example").read_text(), re.MULTILINE)
    (image,) = re.findall(r"^FROM python:([\d.]+)", (ROOT / "launch" / "gke" / "Dockerfile").read_text(), re.MULTILINE)
    assert {launched, image} <= set(tested)


def test_the_readme_example_runs():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    metrics = names["metrics"]
    assert metrics["loss"] < 0.5  # it began at ln 2
    assert metrics["rewards/accuracies"] == 1


def test_the_readme_has_the_commands_that_ci_runs():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    for last_word in ("quickstart", "pytest"):
        assert sum(command.endswith(last_word) for command in commands) == 1

"""Who may import whom, read from the imports themselves; and what an import costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PROJECT = Path(__file__).parents[1]
#: What each package may import of ours, at any depth of a function, beside itself. Small modules count as packages.
MAY_IMPORT = {
    "dvdp": {"dvdp.errors", "dvdp.diffusion"},
    "dvdp.text": set(),
    "dvdp.errors": {"dvdp.text"},
    "dvdp.files": {"dvdp.errors"},
    "dvdp.hardware": set(),
    "dvdp.out_of_memory": {"dvdp.errors", "dvdp.hardware"},
    "dvdp.tensors": {"dvdp.errors"},
    "dvdp.diffusion": {"dvdp.errors"},
    "dvdp.precision": set(),
    "dvdp.yaml_files": {"dvdp.errors"},
    "dvdp.config": {"dvdp.errors", "dvdp.precision", "dvdp.yaml_files", "dvdp.diffusion", "dvdp.data"},
    "dvdp.data": {"dvdp.errors", "dvdp.files", "dvdp.text", "dvdp.diffusion"},
    "dvdp.models": {
        "dvdp.errors", "dvdp.files", "dvdp.tensors", "dvdp.config", "dvdp.diffusion", "dvdp.out_of_memory",
        "dvdp.precision",
    },
    "dvdp.training": {
        "dvdp.errors", "dvdp.files", "dvdp.tensors", "dvdp.config", "dvdp.diffusion", "dvdp.models", "dvdp.data",
        "dvdp.out_of_memory",
    },
    "dvdp.evaluation": {
        "dvdp.errors", "dvdp.files", "dvdp.tensors", "dvdp.text", "dvdp.config", "dvdp.diffusion", "dvdp.models",
        "dvdp.data", "dvdp.out_of_memory",
    },
    "dvdp.planning": {"dvdp.errors", "dvdp.config", "dvdp.diffusion", "dvdp.models", "dvdp.evaluation"},
    "dvdp.audit": {"dvdp.errors", "dvdp.diffusion", "dvdp.models", "dvdp.data", "dvdp.evaluation"},
    "dvdp.identity": {"dvdp.config", "dvdp.models"},
    "pipelines": set(),
    "pipelines.addresses": set(),
    "pipelines.environment": {"pipelines.addresses", "dvdp.errors"},
    "pipelines.provenance": {"dvdp"},
    "pipelines.stages": {"dvdp", "pipelines.jobs"},
    "pipelines.logs": set(),
    "pipelines.jobs": {"dvdp", "pipelines.logs", "pipelines.environment"},
    "pipelines.tracking": {"dvdp", "pipelines.addresses", "pipelines.jobs", "pipelines.provenance"},
    "pipelines.webhook": set(),
    "pipelines.artifacts": set(),
    "pipelines.loopback": set(),
    "pipelines.prefect_server": {"pipelines.addresses", "pipelines.loopback"},
    "pipelines.left_behind": {"dvdp", "pipelines.tracking", "pipelines.webhook"},
    "pipelines.turning_points": {"dvdp", "pipelines.jobs", "pipelines.tracking"},
    "pipelines.starts": {"dvdp", "pipelines.tracking"},
    "pipelines.reports": {
        "dvdp", "pipelines.addresses", "pipelines.jobs", "pipelines.tracking", "pipelines.provenance",
    },
    "pipelines.commands": {
        "dvdp", "pipelines.jobs", "pipelines.tracking", "pipelines.turning_points", "pipelines.starts",
        "pipelines.reports", "pipelines.left_behind", "pipelines.artifacts", "pipelines.loopback",
        "pipelines.prefect_server",
    },
    "pipelines.experiment": {
        "dvdp", "pipelines.jobs", "pipelines.tracking", "pipelines.turning_points", "pipelines.reports",
        "pipelines.provenance", "pipelines.logs", "pipelines.environment", "pipelines.left_behind", "pipelines.webhook",
        "pipelines.artifacts", "pipelines.starts",
    },
    "pipelines.schedules": {
        "dvdp", "pipelines.commands", "pipelines.environment", "pipelines.jobs", "pipelines.left_behind",
        "pipelines.logs", "pipelines.reports", "pipelines.tracking", "pipelines.webhook",
    },
    "pipelines.cli": {"dvdp", "pipelines"},
    "infra": {"dvdp", "pipelines"},
}  # fmt: skip
#: Ten images, in place of the embedded ones, whose source is scikit-learn.
FOLDER = ["-S", "dataset.source=image_folder", "-S", "dataset.path=images", "-S", "dataset.name=ten"]
SERVERS = {"ray", "prefect", "mlflow", "dvc"}


def sources() -> list[Path]:
    return [path for folder in ("dvdp", "pipelines", "infra") for path in sorted((PROJECT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """The longest known beginning of a module's name."""
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in MAY_IMPORT)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, at any depth; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            there = {name for name in names if (PROJECT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= there or {str(node.module)}
    return found


def edges() -> set[tuple[str, str]]:
    """Imports of ours, (module, module)."""
    ours = ("dvdp", "pipelines", "infra")
    return {(module_of(path), name) for path in sources() for name in imported(path) if name.split(".")[0] in ours}


def test_no_package_imports_another_that_it_must_not() -> None:
    wrong = []
    for module, name in sorted(edges()):
        package, other = package_of(module), package_of(name)
        allowed = MAY_IMPORT[package] | {package}
        if not any(other == a or other.startswith(f"{a}.") for a in allowed):
            wrong.append(f"{module} imports {name}")
    assert not wrong, wrong


def test_packages_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, name in edges():
        if package_of(module) != package_of(name):
            graph.setdefault(package_of(module), set()).add(package_of(name))

    def circle(package: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if package in way:
            return (*way[way.index(package) :], package)
        return next((c for other in sorted(graph.get(package, ())) if (c := circle(other, (*way, package)))), None)

    found = [c for package in graph if (c := circle(package, ()))]
    assert not found, found


def test_only_the_pipeline_knows_the_servers() -> None:
    wrong = [
        f"{module_of(path)} imports {name}"
        for path in sources()
        if path.relative_to(PROJECT).parts[0] == "dvdp"
        for name in imported(path)
        if name.split(".")[0] in SERVERS
    ]
    assert not wrong, wrong


#: How the noise is made, which needs more than torch.
NOISE = {"philox.py": {"numpy"}, "philox_cuda.py": {"triton"}}


@pytest.mark.parametrize("folder", ["diffusion"])
def test_the_method_imports_nothing_but_torch(folder: str) -> None:
    for path in sources():
        if f"dvdp/{folder}/" in path.as_posix():
            outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
            assert outside <= {"dvdp", "torch"} | NOISE.get(path.name, set()), path


def test_nothing_imports_triton_before_it_is_needed() -> None:
    """Builds of torch for a CPU have none."""
    code = "import sys; sys.modules['triton'] = None; import torch, dvdp, dvdp.diffusion.philox"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)


def test_importing_dvdp_imports_nothing_beside_torch() -> None:
    code = "import torch, sys; before = set(sys.modules); import dvdp; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert new - set(sys.stdlib_module_names) <= {"dvdp", "torch", "_distutils_hack"}, new


MEASURE = """
import json, sys, time
import torch

start = time.process_time()
import dvdp

seconds = time.process_time() - start
by_dvdp = sorted({name.partition(".")[0] for name in sys.modules})
import dvdp.config

dvdp.config.Params()
by_config = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"seconds": seconds, "dvdp": by_dvdp, "config": by_config}))
"""


def test_import_is_quick_beyond_torch_and_drags_in_nothing_optional() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, cwd=PROJECT)
    found = json.loads(done.stdout)
    assert found["seconds"] < 0.5
    optional = {"lmdb", "ray", "mlflow", "prefect", "dvc", "matplotlib", "sklearn", "albumentations"}
    assert not optional & set(found["config"])
    assert not (optional | {"yaml"}) & set(found["dvdp"])


HEAVY = {"torch", "torchvision", "torch_fidelity", "scipy", "sklearn", "matplotlib", "cv2", "albumentations", "lmdb",
    "ray", "prefect", "mlflow", "dvc", "pandas", "requests", "jinja2", "psutil", "yaml"}  # fmt: skip
#: What each command may import of that; what it does not name here would cost each start of it seconds.
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "help": (["--help"], set()),
    "check": (["check"], set()),
    "params": (["params"], set()),
    "a mistake in params": (["experiment", "-S", "training.batch=0"], set()),
    "prepare": (["prepare", *FOLDER], {"cv2", "albumentations", "scipy", "lmdb", "yaml"}),
    "verify": (["verify", *FOLDER], {"lmdb"}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with ten images, prepared."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "images").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (20 * i, 100, 50)).save(folder / "images" / f"{i}.png")
    (folder / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    code = "from pipelines.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", code, "prepare", *FOLDER], cwd=folder, env=environment, check=True)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_only_what_it_needs(name: str, prepared: Path) -> None:
    command, allowed = COMMANDS[name]
    code = "from pipelines.cli import main; import sys; main(sys.argv[1:]); print('\\n', *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    whole = [sys.executable, "-c", code, *command]
    done = subprocess.run(whole, capture_output=True, text=True, check=True, cwd=prepared, env=environment)
    found = {module.partition(".")[0] for module in done.stdout.splitlines()[-1].split()}
    assert HEAVY & found <= allowed


TRAINING = """
import sys
import dvdp.training.loop, dvdp.models.export, dvdp.identity
heavy = {"ray", "prefect", "mlflow", "dvc", "lmdb", "albumentations", "cv2", "sklearn", "matplotlib"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_training_imports_nothing_that_a_bare_gpu_machine_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == ""

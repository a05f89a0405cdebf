"""The rooms: who may import whom, held by reading every import of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reproduce

PACKAGE = Path(reproduce.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from rooms above it.
ROOMS = [
    "errors", "shipped", "position", "records", "compat",
    "recipe", "report",
    "data", "objective", "model", "training", "tasks", "grid", "stages",
    "cli", "__main__",
]  # fmt: skip
# Rooms in the middle stand by themselves: flat arguments, no recipe, and no report.
ALONE = {
    "recipe": {"errors", "shipped"},
    "report": {"errors", "shipped", "records", "recipe"},
    "data": {"errors", "position", "records", "report"},  # its one figure has the report's style
    "objective": set(),
    # data: characters, and a waveform as training saw it
    "model": {"errors", "position", "records", "compat", "objective", "data"},
    "training": {"errors", "position", "records", "data"},
}
NO_TORCH = {"errors", "shipped", "position", "records", "recipe", "report", "cli", "__main__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def rooms_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("reproduce.")}
    return own - {"__version__"}


def test_every_room_is_known():
    rooms = {room_of(path) for path in FILES} - {"__init__", "_shipped"}
    assert rooms == set(ROOMS)


def test_the_reader_of_imports_sees_them_all(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import a.b\n"
        "from c import d as e\n"
        "if TYPE_CHECKING:\n    import f\n"
        "def function():\n    from g.h import i\n    importlib.import_module('j.k')\n",
        encoding="utf-8",
    )
    assert imports(file) == {"a.b", "c.d", "f", "g.h.i", "j.k"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_from_rooms_above_it(path):
    room = room_of(path)
    if room in ("__init__", "_shipped"):
        assert rooms_imported(path) == set()
        return
    above = set(ROOMS[: ROOMS.index(room)]) | {room}
    assert rooms_imported(path) <= above
    if room in ALONE:
        assert rooms_imported(path) - {room} <= ALONE[room]


def test_records_and_errors_stand_on_the_standard_library():
    for name in ("records", "errors", "shipped", "compat"):
        top = {item.split(".")[0] for item in imports(PACKAGE / f"{name}.py")}
        assert top <= set(sys.stdlib_module_names) | ({"torch"} if name == "compat" else set())


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in NO_TORCH], ids=module_of)
def test_no_torch_above_the_data(path):
    top = {name.split(".")[0] for name in imports(path)}
    assert top.isdisjoint({"torch", "torchaudio", "transformers"})


def test_recipe_report_and_records_run_without_torch():
    modules = [module_of(p) for p in FILES if room_of(p) in NO_TORCH - {"__main__"}]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'torchaudio'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_stages_are_imported_when_a_command_runs():
    tree = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    first = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in first if name.startswith("reproduce")} == {"reproduce.errors"}


def test_torchaudio_comes_through_compat_alone():
    for path in FILES:
        assert not any(name.split(".")[0] == "torchaudio" for name in imports(path)), path


# What torchaudio's wav2vec 2.0 modules call their parts: nobody's promise.
PRIVATE = {
    "conv_layers", "pos_conv_embed", "feature_projection", "intermediate_dense", "output_dense",
    "q_proj", "k_proj", "v_proj", "out_proj", "final_layer_norm", "intermediate_dropout",
}  # fmt: skip


def test_names_inside_torchaudio_live_in_one_file():
    users = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
                users.add(module_of(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_torchaudio"):
                named = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if any("._" in name or "components" in name for name in named):
                    users.add(module_of(path))
    assert users == {"reproduce.model.encoder"}


def test_architecture_names_every_room_and_module():
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    missing = [room for room in ROOMS if f"{room}.py" not in text and f"{room}/" not in text]
    assert missing == []

"""Every public name says what it is: shapes, units, errors, source. Read from the files alone."""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS_OF = (  # all of their functions are public
    *("kernels.monoid", "kernels.dispatch"),
    *("sharding.mesh", "sharding.ops", "sharding.sequence", "sharding.schedule"),
)
DEFINITION = ast.FunctionDef | ast.ClassDef
CHECKS = {"mesh": {"check", "divide", "over_time"}, "checks": {"axes", "floats", "mask", "size"}}
CHECKS["checks"] |= {"stream"}
# what a signature calls an array, and arguments that are pytrees of a layer's own or random keys
ARRAYS, PYTREES = r"\b(Array|Element)\b", {"state", "key", "summary"}


class Thing(NamedTuple):
    """A public name, where it is defined."""

    file: Path
    node: Any

    @property
    def doc(self) -> str:
        """The docstring, or what stands below an assignment."""
        if isinstance(self.node, DEFINITION):
            return ast.get_docstring(self.node) or ""
        return below(tree(self.file).body, self.node)

    @property
    def methods(self) -> list[ast.FunctionDef]:
        body = self.node.body if isinstance(self.node, ast.ClassDef) else []
        defined = [each for each in body if isinstance(each, ast.FunctionDef)]
        return [each for each in defined if each.name == "__call__" or each.name[0] != "_"]

    @property
    def docs(self) -> str:
        """The docstrings of a class and of its methods."""
        return "\n".join([self.doc, *(ast.get_docstring(each) or "" for each in self.methods)])

    @property
    def fields(self) -> dict[str, str]:
        """A dataclass's own fields, with what stands below each."""
        return {
            each.target.id: below(self.node.body, each)
            for each in self.node.body
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        }


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def below(body: list[Any], node: ast.AST) -> str:
    """The string that stands below a statement."""
    after = body[body.index(node) + 1 :][:1]
    text = getattr(after[0], "value", None) if after else None
    return text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def find(file: Path, name: str) -> Thing | None:
    """Where a name that a file has is defined: there, or where in the library it comes from."""
    for node in tree(file).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if getattr(node, "name", None) == name or name in [getattr(t, "id", "") for t in targets]:
            return Thing(file, node)
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        for alias in node.names:
            if name in (alias.asname, alias.name):
                folder = file.parents[node.level - 1].relative_to(ROOT).parts
                return find(
                    file_of(".".join([*folder, *(node.module or "").split(".")])), alias.name
                )
    return None


def exported(folder: str) -> set[str]:
    """What its `__all__` lists."""
    listed = find(file_of(folder), "__all__").node.value
    return {f"{folder}.{name}" for name in ast.literal_eval(listed)}


def functions(module: str) -> set[str]:
    """The functions of a module, and those that it hands on as its own (`import x as x`)."""
    body = tree(file_of(module)).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    handed = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [alias.name for alias in handed if alias.asname == alias.name]
    return {f"{module}.{name}" for name in names if not name.startswith("_")}


KERNELS, LAYERS, MODELS = exported("kernels"), exported("layers"), exported("models")
PUBLIC = KERNELS | LAYERS | MODELS | {"sharding.schedule.Schedule", "models.config.BackboneConfig"}
PUBLIC |= {"models.pretrained.load_pretrained", "models.pretrained.save_pretrained"}
PUBLIC |= {name for module in FUNCTIONS_OF for name in functions(module)}
THINGS = {name: find(file_of(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in PUBLIC}
CALLABLE = {name for name in PUBLIC if isinstance(THINGS[name].node, DEFINITION)}
CONFIGS = {name for name in PUBLIC if name.endswith(("Config", "Schedule"))}

# of fields that are called so, a word that has to stand below them
FIELD_UNITS = {
    r"(head_|cosine_)?width|hidden|shared": "feature|channel|`heads`",
    r"conv|taps|window|chunk|loss_chunk": "token|taps|blocks",
    r"depth": "blocks",
    r"decay_min": "nats per token",
    r"ro(tary|pe)_base": "radian",
    r"dt_(min|max|floor|limit)": "step size",
    r"patch|size": "pixel",
}
# of arguments, a word that the docstring has to have
ARGUMENT_UNITS = {
    "log_decay": "nats per token",
    "delta": "nats per token",
    "reset": "token",
    "chunk": "tokens",
    "block": "tokens",
    "window": "tokens",
    "start": "tokens",
}


def no_docstring(thing: Thing) -> str:
    return "" if thing.doc.strip() else "it has no docstring"


def silent_methods(thing: Thing) -> str:
    """Methods without a docstring that they do not inherit from a class of the library."""
    found = [each.name for each in thing.methods if not ast.get_docstring(each)]
    for base in thing.node.bases:
        parent = find(thing.file, base.id) if isinstance(base, ast.Name) else None
        found = [name for name in found if parent is None or name not in described(parent)]
    return f"no docstring: {', '.join(found)}" if found else ""


def described(thing: Thing) -> set[str]:
    """The methods that have docstrings."""
    return {each.name for each in thing.methods if ast.get_docstring(each)}


def no_shapes(thing: Thing) -> str:
    """Arguments that are arrays, whose axes neither the signature nor the docstring names."""
    made = [thing.node] if isinstance(thing.node, ast.FunctionDef) else thing.methods
    for function in made:
        words = f"{thing.doc}\n{ast.get_docstring(function)}"
        given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        for argument in given:
            if argument.arg == "self" or argument.arg in PYTREES:
                continue
            kind = ast.unparse(argument.annotation) if argument.annotation else "Array"
            kind = re.sub(r"\w+\[Array[^'\"]*(['\"])[^'\"]*\1\]", "", kind)
            axes = rf"\b{argument.arg}\b[^.]*(\(|any shape)"
            if re.search(ARRAYS, kind) and not re.search(axes, words):
                return f"{function.name} does not say the axes of {argument.arg}"
    return ""


def raised(thing: Thing) -> set[str]:
    """What it raises itself, by functions of its file, or by the checks of arguments."""
    there = {each.name: each for each in tree(thing.file).body if isinstance(each, DEFINITION)}
    found, seen, ahead = set(), set(), [thing.node]
    while ahead:
        seen.add(one := ahead.pop())
        own = {each.arg for each in ast.walk(one) if isinstance(each, ast.arg)}
        for node in ast.walk(one):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found.add(node.exc.func.id)
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name):
                found |= {"NotImplementedError"} if function.id == "call" else set()
                here = None if function.id in own else there.get(function.id)
                ahead += [here] if here is not None and here not in seen else []
            elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                known = CHECKS.get(function.value.id, set())
                found |= {"ValueError"} if function.attr in known else set()
    return found


def unsaid_errors(thing: Thing) -> str:
    missing = [name for name in sorted(raised(thing)) if name not in thing.docs]
    return f"it raises {', '.join(missing)} and does not say so" if missing else ""


def no_source(thing: Thing) -> str:
    return "" if re.search(r"arXiv:\d{4}\.\d{5}|\((19|20)\d\d\)", thing.docs) else "whence is it?"


def unsaid_fields(thing: Thing) -> str:
    missing = [name for name, text in thing.fields.items() if not text]
    return f"no docstring below {', '.join(missing)}" if missing else ""


def unitless_fields(thing: Thing) -> str:
    for name, text in thing.fields.items():
        for pattern, unit in FIELD_UNITS.items():
            if re.fullmatch(pattern, name) and not re.search(unit, text, re.I):
                return f"what is {name} in: {unit}?"
    return ""


def unitless_arguments(thing: Thing) -> str:
    if not isinstance(thing.node, ast.FunctionDef):
        return ""
    args = thing.node.args
    names = {argument.arg for argument in args.args + args.kwonlyargs}
    missing = [n for n in ARGUMENT_UNITS if n in names and ARGUMENT_UNITS[n] not in thing.doc]
    return f"what is {missing[0]} in: {ARGUMENT_UNITS[missing[0]]}?" if missing else ""


WITHOUT_SOURCE = {
    "kernels.prefixes",  # of any monoid: the source is the caller's
    "layers.Constant",  # an array that is not trained
}
CLASSES = {name for name in CALLABLE if isinstance(THINGS[name].node, ast.ClassDef)}
NETWORKS = {f"models.{name}" for name in ("Video", "Vision")}
NETWORKS |= {f"{name}Config" for name in NETWORKS} | {"models.SeriesModel", "models.SeriesConfig"}
RULES: tuple[tuple[str, set[str], Callable[[Thing], str]], ...] = (
    ("a docstring", PUBLIC, no_docstring),
    ("docstrings of methods", CLASSES, silent_methods),
    ("shapes", CALLABLE, no_shapes),
    ("errors", CALLABLE, unsaid_errors),
    ("a source", (KERNELS | LAYERS | NETWORKS) - WITHOUT_SOURCE, no_source),
    ("docstrings of fields", CONFIGS, unsaid_fields),
    ("units of fields", CONFIGS, unitless_fields),
    ("units of arguments", KERNELS | {"sharding.ops.positions"}, unitless_arguments),
)


@pytest.mark.parametrize("what, names, wrong", RULES, ids=[what for what, _, _ in RULES])
def test_every_public_name_says(what, names, wrong):
    found = {name: said for name in sorted(names) if (said := wrong(THINGS[name]))}
    assert not found, "\n".join(f"{name}: {said}" for name, said in found.items())


def test_the_rules_find_what_is_missing(tmp_path):
    """A function and a config that say nothing break each rule."""
    text = "def f(x: Array, reset: Any):\n  check(x)\ndef check(x):\n  raise ValueError(1)\n"
    text += "class Config:\n  window: int = 1\n  def method(self): pass\n"
    file = tmp_path / "silent.py"
    file.write_text(text)
    function, config = find(file, "f"), find(file, "Config")
    for wrong in (no_docstring, no_shapes, unsaid_errors, no_source, unitless_arguments):
        assert wrong(function)
    for wrong in (no_docstring, silent_methods, unsaid_fields, unitless_fields):
        assert wrong(config)

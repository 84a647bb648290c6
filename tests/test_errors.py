"""Every error that mts_fast raises says what was expected, what it got, and what to do."""

import ast
from pathlib import Path

import pytest

import mts_fast
from mts_fast._check import fail

PACKAGE = Path(mts_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# exceptions of unreachable code, of iteration, of the command line's exit, and reasons that a
# caller puts into a message of its own
INTERNAL = {
    *("AssertionError", "StopIteration", "SystemExit"),
    *("UnreadableImage", "UnreadableFiles", "_Damaged"),
}


def calls(tree, name):
    """All calls of a function of that name."""
    for node in ast.walk(tree):
        called = getattr(node, "func", None)
        if isinstance(node, ast.Call) and name in (
            getattr(called, "id", ""),
            getattr(called, "attr", ""),
        ):
            yield node


def raises(tree):
    """(node, name of the exception) of every `raise` that makes one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node, getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))


def literals(node, tree):
    """All text in a raise, and in the assignments of the function around it."""
    functions = [
        f
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and f.lineno <= node.lineno <= (f.end_lineno or 0)
    ]
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    called = {getattr(c.func, "id", "") for c in ast.walk(node) if isinstance(c, ast.Call)}
    sources = [node]
    for function in functions:
        sources += [
            a
            for a in ast.walk(function)
            if isinstance(a, ast.Assign) and any(getattr(t, "id", "") in names for t in a.targets)
        ]
    sources += [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name in called]
    return " ".join(
        c.value
        for source in sources
        for c in ast.walk(source)
        if isinstance(c, ast.Constant) and isinstance(c.value, str)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_error_has_its_three_parts(path):
    tree = ast.parse(path.read_text())
    for call in calls(tree, "fail"):
        arguments = dict(
            zip(("error", "op", "arg", "expected", "got", "hint"), call.args, strict=False)
        )
        arguments |= {k.arg: k.value for k in call.keywords}
        hint = arguments.get("hint")
        assert hint is not None, f"line {call.lineno}: no word on what to do"
        assert not (isinstance(hint, ast.Constant) and not hint.value), f"line {call.lineno}: empty"
    if path.name == "_check.py":
        return
    for node, name in raises(tree):
        if name in INTERNAL or name.startswith("_") or name in ("Refused", "Unsupported"):
            continue
        text = literals(node, tree)
        for part in ("must be", "got", ";"):
            assert part in text, f"line {node.lineno}: {name} without {part!r} in {text!r}"


def test_there_are_errors_to_look_at():
    """The walk finds calls of `fail`: after a renaming it would check nothing."""
    fail_calls = [c for path in FILES for c in calls(ast.parse(path.read_text()), "fail")]
    assert len(fail_calls) > 200


def test_the_format():
    with pytest.raises(ValueError) as seen:
        fail(ValueError, "op", "arg", "right", "wrong", "mend it")
    assert str(seen.value) == "op: arg must be right, got wrong; mend it"
    with pytest.raises(TypeError, match="hint"):
        fail(ValueError, "op", "arg", "right", "wrong")

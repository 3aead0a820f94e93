"""What a test's result depends on: the files that it imports, directly or not, the agent, the lab, the programs.

So that a change elsewhere (a report, a benchmark) does not make results of other kernels old, which are dear.
"""

import ast
import functools
import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: What runs in processes that a test starts, without an import that shows.
STARTED = ("tests/conftest.py", "tracer/agent.py", "tracer/cli/agent.py", "tracer/kernel/loader.py", "tracer/lab/*.py",
           "bpf/**/*.[ch]")  # fmt: skip
#: What may have a docstring.
_DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def files(test: str, root: Path = ROOT) -> list[str]:
    """Paths below `root`, sorted."""
    waiting = [test, *(str(path.relative_to(root)) for pattern in STARTED for path in root.glob(pattern))]
    found = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            if name.endswith(".py"):
                waiting += _imported(root, name)
    return sorted(found)


def digest(test: str, root: Path = ROOT) -> str:
    """Of all that they do: comments, docstrings and layout of Python are left out."""
    whole = hashlib.sha256()
    for name in files(test, root):
        content = (root / name).read_bytes()
        whole.update(name.encode() + b"\0" + (_meaning(content) if name.endswith(".py") else content))
    return whole.hexdigest()[:16]


@functools.cache
def _meaning(source: bytes) -> bytes:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree).encode()


@functools.cache
def _imported(root: Path, name: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse((root / name).read_text())):
        if isinstance(node, ast.Import):
            found += [_path(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # what a package gives by itself, or a module in it, which does not need the rest of the package
            found += [_path(root, f"{node.module}.{alias.name}") or _path(root, node.module) for alias in node.names]
    return [path for path in found if path]


def _path(root: Path, module: str) -> str:
    """Of a module or package of this project; empty if it is none."""
    stem = module.replace(".", "/")
    tried = (f"{base}{stem}{end}" for base in ("", "tests/") for end in (".py", "/__init__.py"))
    return next((path for path in tried if (root / path).is_file()), "")

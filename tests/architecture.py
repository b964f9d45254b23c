"""What docs/architecture.md forbids, read from sources alone: the arrows between modules, circles,
questions about a device, and how long a thing may be."""

from __future__ import annotations

import ast
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Sources = Mapping[str, str]  # text by module, "gpl_fast.net.steps"; a package's by the package

# Who may not import whom, be it lazily or for a type checker; `reference` none but torch.
NEVER = (("net", "fast"), ("targets", "fast"), ("kernels", "fast"))
OF_TOOLS = ("cli", "demo", "experiments", "tools")  # who may import the tools
# Where nobody asks which device there is, and who may for them.
ASKS_NOT, ASKS = ("fast", "kernels"), "fast.policy"
QUESTIONS = {"get_device_capability", "get_device_properties", "is_cuda", "is_available",
             "current_device"}  # fmt: skip
FILE, CLASS, FUNCTION, KERNEL, ARGUMENTS = 250, 200, 60, 150, 8


def within(module: str, part: str) -> bool:
    """Whether `module` is this part of gpl_fast, or lies in it."""
    return f"{module}.".startswith(f"gpl_fast.{part}.")


def imports(module: str, sources: Sources) -> set[str]:
    """Modules that `module` imports, wherever in its text: the ones that it names, and of ours the
    packages that Python runs before these, but for those around `module` itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in sources else str(node.module) for name in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    parts = [name.split(".") for name in found]
    packages = {".".join(p[:i]) for p in parts for i in range(2, len(p))} & set(sources)
    return found | {package for package in packages if not f"{module}.".startswith(f"{package}.")}


def arrows(sources: Sources) -> list[str]:
    """The arrows that may not be, "a -> b"."""
    found = []
    for module in sources:
        for other in sorted(imports(module, sources)):
            foreign = other.partition(".")[0] not in {"torch", *sys.stdlib_module_names}
            if (
                any(within(module, a) and within(other, b) for a, b in NEVER)
                or (within(other, "tools") and not any(within(module, a) for a in OF_TOOLS))
                or (within(module, "reference") and foreign)
            ):
                found.append(f"{module} -> {other}")
    return found


def circles(sources: Sources) -> list[str]:
    """Modules that are reached from themselves, "a -> b -> a"."""
    after = {m: sorted((imports(m, sources) & set(sources)) - {m}) for m in sources}
    done: set[str] = set()
    found: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in after[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in sources:
        visit(module, [])
    return found


def questions(sources: Sources) -> list[str]:
    """Where walks and stages ask for a device, "module: question"."""
    found = []
    for module, text in sources.items():
        if not any(within(module, part) for part in ASKS_NOT) or within(module, ASKS):
            continue
        for node in ast.walk(ast.parse(text)):
            asked = isinstance(node, ast.Attribute) and node.attr in QUESTIONS
            if isinstance(node, ast.Compare):
                asked = bool(re.search(r"\bdevice\.type\b", ast.unparse(node)))
            if asked:
                found.append(f"{module}: {ast.unparse(node)}")
    return found


def torch_headers(files: Mapping[str, str]) -> list[str]:
    """Of all of csrc by path: torch's headers that the CUDA sources include, or what they include,
    "path: header"."""
    found = []
    reached = [path for path in files if path.startswith("csrc/cuda/")]
    for path in reached:
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', files[path]):
            if re.match(r"(torch|ATen|c10|caffe2)/", header):
                found.append(f"{path}: {header}")
            near = posixpath.normpath(f"{posixpath.dirname(path)}/{header}")
            if near in files and near not in reached:
                reached.append(near)
    return found


def beyond(sources: Sources) -> dict[str, list[str]]:
    """By module, what is more than it may be: "name: lines"."""
    found: dict[str, list[str]] = {}
    for module, text in sources.items():
        parts = [n for n in ast.walk(ast.parse(text)) if isinstance(n, Definition)]
        said = [f"{node.name}: {what}" for node in parts for what in _beyond(node)]
        if (lines := len(text.splitlines())) > FILE:
            said.append(f"{lines} lines")
        if said:
            found[module] = said
    return found


def _beyond(node: Definition) -> Iterator[str]:
    lines = (node.end_lineno or 0) - node.lineno + 1
    if isinstance(node, ast.ClassDef):
        if lines > CLASS:
            yield f"{lines} lines"
        return
    of_triton = any("jit" in ast.unparse(d) for d in node.decorator_list)
    if lines > (KERNEL if of_triton else FUNCTION):
        yield f"{lines} lines"
    named = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    if not of_triton and (count := len(named) - (named[:1] in (["self"], ["cls"]))) > ARGUMENTS:
        yield f"{count} arguments that are not by keyword alone"

"""Writes docs/cli.md and docs/api.md from the code: the commands' own help, and signatures and docstrings of what is public.

python scripts/reference.py [FOLDER]    (`make docs`; tests/unit/test_reference.py compares)
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import kvcast

ROOT = Path(__file__).resolve().parent.parent
MORE = {
    "kvcast.models": ["resolve"],
    "kvcast.chat": ["Conversation", "Figures"],
    "kvcast.chat.documents": ["DocumentCache", "Entry"],
    "kvcast.integrations.langchain": ["ChatKvcast"],
}
NOTE = "Made from the code by `make docs`; edit the code instead.\n"


def cli() -> str:
    """Every command's --help, by typer's own generator."""
    command = [sys.executable, "-m", "typer", "kvcast.cli.app", "utils", "docs", "--name", "kvcast", "--title", "The `kvcast` command"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{NOTE}{rest.rstrip()}\n"


def api() -> str:
    """The public names, in the order of their modules."""
    parts = ["# The Python API\n", NOTE]
    for module, names in {"kvcast": kvcast.__all__, **MORE}.items():
        parts.append(f"## {module}\n")
        for name in sorted(names, key=lambda n: (n.endswith(("Error", "Unsupported", "Untested")), n)):
            thing = getattr(importlib.import_module(module), name)
            node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
            parts.append(described(node, module))
            if isinstance(node, ast.ClassDef):
                parts += [described(method, name) for method in methods(thing)]
    return "\n".join(parts)


def methods(kind: type) -> list[ast.FunctionDef]:
    """Public ones, its own first, then those of kvcast's classes that it is made from and that it leaves as they are."""
    found: dict[str, ast.FunctionDef] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "kvcast" or (base is not kind and base.__name__ == "NativeHandle"):
            continue
        node = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(node, ast.ClassDef)
        of_base = [n for n in node.body if isinstance(n, ast.FunctionDef) and is_public(n)]
        found |= {n.name: n for n in reversed(of_base) if n.name not in found}
    return sorted(found.values(), key=lambda n: n.name)


def is_public(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or ast.get_docstring(node) is None:
        return False
    return not any(isinstance(d, ast.Call) for d in node.decorator_list)  # a validator, called by the base class


def described(node: ast.stmt, owner: str) -> str:
    """A heading, the signature, and the docstring as Markdown."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    level = "####" if owner[0].isupper() else "###"
    doc = markdown(ast.get_docstring(node) or "")
    return f"{level} {owner + '.' if level == '####' else ''}{node.name}\n\n```python\n{signature(node)}\n```\n\n{doc}\n"


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    """As in the source, wrapped where it is long."""
    if isinstance(node, ast.FunctionDef):
        if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
            return f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
        arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
        line = f"{node.name}({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
        return textwrap.fill(line, 130, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        return "class " + signature(init).replace("__init__", node.name)
    fields = [f"    {ast.unparse(n)}" for n in node.body if isinstance(n, ast.AnnAssign)]
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    return "\n".join([f"class {node.name}" + (f"({bases})" if bases else "") + (":" if fields else ""), *fields])


def markdown(doc: str) -> str:
    """A numpydoc docstring: its sections as bold words, what they list as items."""
    doc = re.sub(r"``([^`]+)``", r"`\1`", doc)
    doc = re.sub(r"^(\w+)\n-{3,}\n", r"**\1**\n\n", doc, flags=re.M)
    head, *sections = re.split(r"(?=^\*\*\w+\*\*$)", doc, flags=re.M)
    return head + "".join(re.sub(r"^(?!\*\*\w+\*\*$)(\S.*)$", r"- `\1`", section, flags=re.M) for section in sections)


def main(folder: Path) -> None:
    (folder / "cli.md").write_text(cli())
    (folder / "api.md").write_text(api())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")

"""Definitions of ours as one file that needs none of our packages."""

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache

OURS = {"diffusion", "students"}
Name = tuple[str, str]  # a module, and a name at its top level


def bundle(entry: Name, instead: Mapping[Name, Name], about: str) -> str:
    """The source of what the entry names, and before it of all of ours that it uses.

    instead: definitions to take in the place of others. about: the file's docstring. Annotations
    are not evaluated, so that what they alone name is left out.
    """
    imports: dict[str, None] = {}
    sources: dict[Name, str] = {}
    started: set[Name] = set()

    def visit(name: Name) -> None:
        if name in instead:
            stands, taken = name[1], instead[name]
            visit(taken)
            sources[name] = f"{stands} = {taken[1]}"
            return
        if name in started:
            return
        started.add(name)
        node = _definitions(name[0]).get(name[1])
        match node:
            case None:  # a builtin, or a name of the definition's own
                return
            case ast.ImportFrom(str(module), aliases) if module.split(".")[0] in OURS:
                alias = next(each for each in aliases if (each.asname or each.name) == name[1])
                if alias.asname:
                    raise ValueError(f"{name[0]} imports {alias.name} under another name")
                visit((module, alias.name))
            case ast.Import() | ast.ImportFrom():
                alias = next(x for x in node.names if (x.asname or x.name.split(".")[0]) == name[1])
                renamed = f" as {alias.asname}" if alias.asname else ""
                start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                imports[f"{start}import {alias.name}{renamed}"] = None
            case _:
                for used in dict.fromkeys(_names(node)):
                    visit((name[0], used))
                sources[name] = _source(name[0], node)

    visit(entry)
    head = f'"""{about}"""\n\nfrom __future__ import annotations\n\n'
    return head + "\n".join(sorted(imports)) + "\n\n\n" + "\n\n\n".join(sources.values()) + "\n"


@cache
def _text(module: str) -> str:
    return inspect.getsource(sys.modules[module])


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """What defines each name at the module's top level."""
    defined: dict[str, ast.stmt] = {}
    for node in ast.parse(_text(module)).body:
        match node:
            case ast.Import(aliases) | ast.ImportFrom(_, aliases):
                names = [alias.asname or alias.name.split(".")[0] for alias in aliases]
            case ast.FunctionDef(name) | ast.ClassDef(name):
                names = [name]
            case ast.Assign(targets):
                names = [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)]
            case ast.AnnAssign(ast.Name(name)):
                names = [name]
            case _:
                names = []
        defined |= dict.fromkeys(names, node)
    return defined


def _names(node: ast.AST) -> Iterator[str]:
    """The names that are read where it is run, which those of annotations are not."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
                yield child.id
            elif isinstance(child, ast.AST):
                yield from _names(child)


def _source(module: str, node: ast.stmt) -> str:
    """The text of a definition as it stands there, with its decorators."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    return "\n".join(_text(module).splitlines()[first - 1 : node.end_lineno])

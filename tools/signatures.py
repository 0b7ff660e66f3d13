"""Write the signature of every name on the reference pages into them, for who reads the Markdown: `make signatures`.

The built site has them from autodoc, and leaves out what is written here (docs/site_signatures.py). Types are written
as in the source, with the short names that it has for them; what these stand for closes a page.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import dedent, indent, wrap
from typing import Any, Final, NamedTuple, TypeVar, Unpack, get_args, get_origin

PAGES: Final = sorted((Path(__file__).parents[1] / "docs" / "reference").glob("*.md"))
BEGIN: Final = "<!-- signatures: written by `make signatures` -->\n"
END: Final = "<!-- end of signatures -->\n"
WIDTH: Final = 100
DIRECTIVE: Final = re.compile(r"^\.\. (currentmodule|autofunction|autoclass):: (\S+)$", re.MULTILINE)
PLAIN: Final = (bool, int, float, str, type(None))
"""Defaults of these types are shown by their value, others but for tuples of numbers as in the source."""


class Source(NamedTuple):
    """What the source says of one function, or of how an object of a class is made.

    Attributes:
        types: of each parameter, and of what is returned.
        defaults: of each parameter that has one.
        modules: where the names in them are looked up.
        made: whether it is said here how an object is made.
    """

    types: dict[str, str]
    defaults: dict[str, str]
    modules: tuple[str, ...]
    made: bool = True


def written(page: str) -> str:
    """A page with the signatures of the names on it."""
    before = page.partition(BEGIN)[0].rstrip("\n")
    entries: list[str] = []
    short: dict[str, str] = {}
    for address, value in documented(before):
        lines = list(class_lines(value, short)) if inspect.isclass(value) else [signature(value, short)]
        summary = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
        entries.append(f"### {address}\n\n{summary}\n\n{block(lines)}")
    if short:
        entries.append("### Short names of types\n\n" + block(f"{name} = {short[name]}" for name in sorted(short)))
    return "\n".join([before, "", BEGIN, "## Signatures\n", *entries, END]) if entries else page


def documented(page: str) -> Iterator[tuple[str, Any]]:
    """Address and value of every function and class on a page."""
    place = ""
    for kind, name in DIRECTIVE.findall(page):
        if kind == "currentmodule":
            place = name
            continue
        address = name if name.startswith("fsteer_lens.") else f"{place}.{name}"
        module, _, own = address.rpartition(".")
        yield address, getattr(importlib.import_module(module), own)


def block(lines: Iterable[str]) -> str:
    """Lines as a block of code that is shown and not run."""
    return "```py\n" + "\n".join(lines) + "\n```\n"


def class_lines(cls: type, short: dict[str, str]) -> Iterator[str]:
    """How an object is made, and the methods that the class itself has."""
    if inspect.isabstract(cls) or getattr(cls, "_is_protocol", False):
        yield f"class {cls.__name__}"
    elif issubclass(cls, Exception) and not source_of_class(cls).made:
        yield f"class {cls.__name__}({cls.__bases__[0].__name__})"
    else:
        yield signature(cls, short)
    for name, member in vars(cls).items():
        of_class = isinstance(member, classmethod | staticmethod)
        if not name.startswith("_") and (of_class or inspect.isfunction(member)):
            told = f"{cls.__name__}.{name}" if of_class else f".{name}"
            yield indent(signature(getattr(cls, name), short, told, skipped=0 if of_class else 1), "    ")


def signature(value: Any, short: dict[str, str], name: str = "", skipped: int = 0) -> str:
    """A signature with its types and defaults, on one line or with a line for each parameter.

    Args:
        value: a function or a class.
        short: is given the short names of types that stand in it, with what they stand for.
        name: what to call it; empty for its own name.
        skipped: how many parameters to leave out, 1 for self.
    """
    source = source_of_class(value) if inspect.isclass(value) else source_of(value)
    parameters = list(inspect.signature(value).parameters.values())[skipped:]
    parts = [part for place in range(len(parameters)) for part in shown(parameters, place, value, source)]
    returned = f" -> {source.types['return']}" if "return" in source.types else ""
    name = name or value.__name__
    text = f"{name}({', '.join(parts)}){returned}"
    if len(text) > WIDTH or "#" in text:
        text = "\n".join([f"{name}(", *(indent(with_comma(part), "    ") for part in parts), f"){returned}"])
    short |= short_names(text, source.modules)
    return text


def with_comma(part: str) -> str:
    """A parameter on a line of its own; a comment follows the comma, on as many lines as it takes."""
    told, _, comment = part.partition("  # ")
    if not comment:
        return f"{told},"
    start = f"{told},  # "
    first, *others = wrap(comment, WIDTH - 4 - len(start))
    return "\n".join([start + first, *(f"{'# ':>{len(start)}}{line}" for line in others)])


def shown(parameters: list[inspect.Parameter], place: int, value: Any, source: Source) -> Iterator[str]:
    """One parameter, after a star where those by name begin; of options that have a type of their own their names."""
    parameter = parameters[place]
    before = {one.kind for one in parameters[:place]}
    if parameter.kind is parameter.KEYWORD_ONLY and not before & {parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL}:
        yield "*"
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    if get_origin(parameter.annotation) is Unpack:
        (options,) = get_args(parameter.annotation)
        yield f"{star}{parameter.name}  # {', '.join(options.__annotations__)}"
        return
    text = star + parameter.name
    if parameter.name in source.types:
        text += f": {source.types[parameter.name]}"
    if parameter.default is not parameter.empty:
        text += (" = " if ":" in text else "=") + default_text(parameter, value, source)
    yield text


def default_text(parameter: inspect.Parameter, value: Any, source: Source) -> str:
    """A default as somebody would write it."""
    default = parameter.default
    if inspect.isclass(value) and repr(default) == "<factory>":
        (made_by,) = (item.default_factory for item in dataclasses.fields(value) if item.name == parameter.name)
        assert made_by is not dataclasses.MISSING
        made = made_by()
        return repr(made) if isinstance(made, dict | list) else f"{type(made).__name__}()"
    numbers = type(default) is tuple and all(isinstance(one, int | float) for one in default)
    if not numbers and not isinstance(default, PLAIN):
        return source.defaults[parameter.name]
    return f'"{default}"' if isinstance(default, str) else repr(default)


def source_of(function: Any) -> Source:
    """What the source says of a function."""
    function = inspect.unwrap(function)
    text = dedent(inspect.getsource(function))
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    return said_of(node, text, function.__module__)


def said_of(node: ast.FunctionDef, text: str, module: str) -> Source:
    """What a definition says."""
    told = node.args
    by_place = [*told.posonlyargs, *told.args]
    stars = [one for one in (told.vararg, told.kwarg) if one is not None]
    types = [(one.arg, one.annotation) for one in (*by_place, *told.kwonlyargs, *stars)] + [("return", node.returns)]
    optional = [*by_place[len(by_place) - len(told.defaults) :], *told.kwonlyargs]
    defaults = zip(optional, [*told.defaults, *told.kw_defaults], strict=True)
    return Source(
        {name: type_text(text, part) for name, part in types if part is not None},
        {one.arg: text_of(text, part) for one, part in defaults if part is not None},
        (module,),
    )


def source_of_class(cls: type) -> Source:
    """What the source of a class, and of those that it is built on, says of how an object is made."""
    types: dict[str, str] = {}
    defaults: dict[str, str] = {}
    modules: tuple[str, ...] = ()
    made = False
    for one in reversed([base for base in cls.__mro__ if base.__module__.startswith("fsteer_lens")]):
        text = dedent(inspect.getsource(one))
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.ClassDef)
        modules = (one.__module__, *modules)
        made = dataclasses.is_dataclass(one)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                types[item.target.id] = type_text(text, item.annotation)
                if item.value is not None:
                    defaults[item.target.id] = text_of(text, item.value)
            elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
                said, made = said_of(item, text, one.__module__), True
                types |= said.types
                defaults |= said.defaults
    types.pop("return", None)
    return Source(types, defaults, modules, made)


def text_of(text: str, node: ast.expr) -> str:
    """The source of one expression on one line."""
    return " ".join((ast.get_source_segment(text, node) or "").split())


def type_text(text: str, node: ast.expr) -> str:
    """The source of a type, without the quotes of one that comes later."""
    told = text_of(text, node)
    if told.startswith('"') and told.endswith('"') and told.count('"') == 2:
        told = told.strip('"')
    return re.sub(r"\bOwn\b", "Self", told)


def short_names(text: str, modules: Iterable[str]) -> dict[str, str]:
    """What names of types stand for, where they stand for something longer: those in a text, and those in these."""
    found: dict[str, str] = {}
    for name in re.findall(r"\b[A-Z]\w+\b", re.sub(r'"[^"]*"', "", text)):
        for module in modules:
            alias, home = alias_of(name, module)
            if alias and alias != name:
                found |= {name: alias, **short_names(alias, [home])}
                break
    return found


def alias_of(name: str, module: str) -> tuple[str, str]:
    """The text that a module gives a name of a type, and the module where it does; empty where it is none."""
    value = vars(sys.modules[module]).get(name)
    if value is None or inspect.isclass(value) or isinstance(value, TypeVar):
        return "", module
    text = inspect.getsource(sys.modules[module])
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and name in [one.name for one in node.names]:
            own = (node.module or "").startswith("fsteer_lens")
            return alias_of(name, str(node.module)) if own else ("", module)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return type_text(text, node.value), module
    return "", module


def main() -> None:
    """Write all pages."""
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

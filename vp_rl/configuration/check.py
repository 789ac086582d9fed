"""Whether a configuration can be built: looked at as a whole, before anything is.

Each node with a `_target_` is held against the signature of what it names: its arguments' names, types and ranges
(`kinds`), and that nodes stand where such objects are asked for. So a mistyped value is said by its name in the
configuration, before a model is loaded.
"""

import difflib
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter

from vp_rl.configuration.own import THEIRS
from vp_rl.secrets import guard, mask, refuse_literal

Tree = Mapping[str, Any]

_OWN = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}  # Hydra's keys
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_LARGEST = 2**63 - 1  # of numbers that torch takes as they are
_MOST = 80  # characters of a value that are shown
_EMPTY = inspect.Parameter.empty


def check(
    settings: Tree,
    own: Mapping[str, Any] | None = None,
    *,
    written: Tree | None = None,
    folder: Path | None = None,
    later: Sequence[str] = (),
) -> None:
    """Looks at all of a composed and resolved configuration; builds nothing but optimizers of one number.

    Args:
        settings: nested as it is, in plain containers.
        own: the hints of settings that no node has, by their dotted names.
        written: the configuration before it is resolved, which must hold no keys and passwords.
        folder: of the run: where Hydra has written the settings, in `.hydra`.
        later: names of settings that may be `auto`, as they are filled in.

    Raises:
        ValueError: a line for each setting that cannot be.
    """
    guard(())  # also in a process that a launcher has started
    try:
        refuse_literal("", written or {})
    except ValueError:
        for file in [] if folder is None else (folder / ".hydra").glob("*.yaml"):
            file.write_text(mask(file.read_text(encoding="utf-8")), encoding="utf-8")
        raise
    # A setting is passed on to others by interpolation: its shortest name is the one that a user knows.
    found: dict[tuple[str, str], str] = {}
    for name, hint in (own or {}).items():
        value: Any = settings
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not fits(value, hint):
            found[name.rpartition(".")[2], repr(value)] = said(name, value, hint)
    for path, node in sorted(_nodes(settings), key=lambda place: place[0].count(".")):
        for argument, value, problem in _problems(path, node, later):
            found.setdefault((argument, repr(value)), problem)
    if found:
        raise ValueError("\n".join(dict.fromkeys(mask(each) for each in found.values())))


def said(name: str, value: Any, hint: Any) -> str:
    """The line that refuses a value."""
    if value is None:
        shown = "null"
    elif isinstance(value, Mapping) and "_target_" in value:
        shown = f"{value['_target_']}(...)"
    else:
        shown = repr(value)
    shown = shown if len(shown) <= _MOST else f"{shown[:_MOST]}..."
    return f"{name}={shown} must be {words(hint)}."


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, or the nodes in it, may stand where this type is asked for; an unknown type takes all."""
    if _is_node(value):
        return _may_be(value, hint)
    if any(_nodes(value)):
        least = 2 if isinstance(value, Mapping) else 1
        members = [member for member in _members(hint) if len(get_args(member)) >= least]
        items = list(value.values() if isinstance(value, Mapping) else value)
        return not members or any(all(fits(item, get_args(member)[-1]) for item in items) for member in members)
    if any(isinstance(leaf, int | float) and not abs(leaf) <= _LARGEST for leaf in _leaves(value)):
        return False
    adapter = _adapter(hint)
    if adapter is None:
        return True
    for each in (value, _tuples(value)):  # YAML has no tuples
        try:
            adapter.validate_python(each)
        except ValueError:
            continue
        except (TypeError, AttributeError):  # a class that cannot be asked, such as a protocol
            return True
        return True
    return False


def words(hint: Any) -> str:
    """What a type asks for, in a user's words."""
    members = _members(hint)
    if len(members) > 1:  # what no YAML has is left out where something else would do
        plain = [member for member in members if not words(member).startswith("a node")]
        some = plain if set(plain) - {type(None)} else members
        return " or ".join(dict.fromkeys(map(words, sorted(some, key=lambda member: member is type(None)))))
    (hint,) = members
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{words(arguments[0])}{''.join(_limits(limit) for limit in arguments[1:])}"
    if origin is Literal:
        return " or ".join("null" if each is None else str(each) for each in arguments)
    plain = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    plain |= {Any: "anything", type(None): "null", list: "a list", tuple: "a list", dict: "settings by their names"}
    if hint in plain:
        return plain[hint]
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"settings by their names, each {words(arguments[-1])}"
    if inspect.isclass(origin) and issubclass(origin, tuple) and arguments[-1:] != (Ellipsis,):
        return f"a list of {' and '.join(map(words, arguments))}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list, each {words(arguments[0])}"
    if origin is not None and "Callable" in str(origin):
        return "a node with a _target_ and _partial_: true"
    return f"a node with the _target_ of a {getattr(hint, '__name__', 'fitting class')}"


def _limits(limit: Any) -> str:
    """What an annotated range says of a number, or a length of a text or a list."""
    least, above, most = (getattr(limit, name, None) for name in ("ge", "gt", "le"))
    if least is not None and most is not None:
        return f" from {least} to {most}"
    said = "" if least is None else f" of at least {least}"
    said += "" if above is None else f" above {above}"
    said += "" if most is None else f"{' and' if said else ' of'} at most {most:,g}"
    said += "" if (below := getattr(limit, "lt", None)) is None else f"{' and' if said else ''} below {below}"
    return said + (", not empty" if getattr(limit, "min_length", 0) else "") + getattr(limit, "words", "")


def _problems(path: str, node: Tree, later: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """The arguments of a node that cannot be: name, value, and what is said of it."""
    name = node["_target_"]
    try:
        target = resolve(name)
        signature = inspect.signature(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        yield "", name, f"{path}._target_={name!r} cannot be used: {error}"
        return
    parameters = signature.parameters
    given = {str(key): value for key, value in node.items() if key not in _OWN}
    given |= dict(zip(parameters, node.get("_args_") or (), strict=False))
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    hints = _hints(target) | THEIRS.get(name, {})
    before = False  # a problem was said
    for key, value in given.items():
        place = f"{path}.{key}".lstrip(".")
        if key not in parameters:
            if not takes_all:
                before = True
                near = difflib.get_close_matches(key, parameters, 1)
                meant = f": {path}.{near[0]}?" if near else f", which has {', '.join(parameters) or 'none'}."
                yield key, value, f"{place} is no setting of {name}{meant}"
            continue
        hint = hints[key]
        if (value == "auto" and place in later) or fits(value, hint):
            continue
        before = True
        yield key, value, said(place, value, hint)
    if not node.get("_partial_"):
        for key, parameter in parameters.items():
            if parameter.default is _EMPTY and key not in given and parameter.kind in (1, 3):
                yield key, None, f"{path}.{key} is missing: {name} needs it."
    if not before and (problem := _of_optimizer(target, given)):
        yield "", str(given), f"{', '.join(f'{path}.{key}={value}' for key, value in given.items())}: {problem}."


def resolve(name: str) -> Any:
    """What a `_target_` names.

    Raises:
        ImportError, AttributeError: there is no such thing.
    """
    return pkgutil.resolve_name(name)


def _of_optimizer(target: Any, given: Tree) -> str | None:
    """What an optimizer says of its settings; it would when training begins, and many have no hints."""
    if not inspect.isclass(target) or not any(base.__module__ == "torch.optim.optimizer" for base in target.__mro__):
        return None
    import torch

    make: Any = target
    try:
        make([torch.nn.Parameter(torch.zeros(1))], **given)
    except (ValueError, TypeError, RuntimeError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return None


def _hints(target: Any) -> dict[str, Any]:
    """The types of its arguments, as far as they are known: of one that has none, its default's."""
    names = vars(sys.modules[target.__module__]) if target.__module__ in sys.modules else {}
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            try:
                hint = eval(hint, names)  # one by one: some have names that are there for type checkers alone
            except Exception:
                hint = Any
        found[name] = _like(parameter.default) if hint is _EMPTY else hint
    return found


def _like(default: Any) -> Any:
    if isinstance(default, bool | str):
        return type(default)
    return float if isinstance(default, int | float) else Any


def _may_be(node: Tree, hint: Any) -> bool:
    """Whether what a node makes may stand where this type is asked for."""
    try:
        target = resolve(node["_target_"])
    except (ImportError, AttributeError, ValueError):
        return True  # said elsewhere
    made = target if inspect.isclass(target) else _hints_of_result(target)
    for member in _members(hint):
        origin = get_origin(member) or member
        if origin is Annotated:
            return _may_be(node, get_args(member)[0])
        if member is Any or isinstance(member, TypeVar) or getattr(member, "_is_protocol", False):
            return True
        if origin is Callable or "Callable" in str(origin):
            if node.get("_partial_") or (inspect.isclass(made) and hasattr(made, "__call__")):  # noqa: B004
                return True
        elif inspect.isclass(origin) and not node.get("_partial_") and (made is None or issubclass(made, origin)):
            return True
    return False


def _hints_of_result(target: Any) -> type | None:
    found = getattr(target, "__annotations__", {}).get("return")
    if isinstance(found, str) and inspect.isclass(getattr(target, "__self__", None)):
        return target.__self__ if target.__self__.__name__ == found.strip("'\"") else None
    return found if inspect.isclass(found) else None


def _members(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _nodes(value: Any, path: str = "") -> Iterator[tuple[str, Tree]]:
    """All nodes with a `_target_`, by their dotted place."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield path, value
        for key, item in value.items():
            yield from _nodes(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _nodes(item, f"{path}[{place}]")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        yield from _leaves(item)
    if not isinstance(value, list):
        yield value


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _adapter(hint: Any) -> TypeAdapter | None:
    """What looks at plain values; None for a type that it knows nothing of."""
    try:
        return _known(hint)
    except Exception:  # of what it cannot make sense of pydantic raises many things
        return None


@lru_cache(maxsize=1024)
def _known(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=None if _has_config(hint) else _STRICT)


def _has_config(hint: Any) -> bool:
    """Of dataclasses and the like pydantic takes no other configuration than theirs."""
    return inspect.isclass(hint) and (hasattr(hint, "__dataclass_fields__") or hasattr(hint, "__pydantic_config__"))

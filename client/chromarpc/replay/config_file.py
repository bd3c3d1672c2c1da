"""Reads a training run's config, which strangers wrote: YAML or JSON within limits, as plain values.

Numbers, `${NAME}` and `[name]` come out as ai-toolkit (toolkit/config.py) has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import yaml

Plain: TypeAlias = "dict[str, Plain] | list[Plain] | str | int | float | bool | None"

MAX_CONFIG_BYTES: Final = 1024**2
MAX_DEPTH: Final = 48
MAX_NODES: Final = 40_000
"""Values of a config, an alias counted as all that it stands for."""
MAX_NUMBER_CHARS: Final = 64
_VARIABLE: Final = re.compile(r"\$\{([^}]+)\}")
_NUMBERS: Final = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class ConfigError(Exception):
    """The config cannot be read, or is none of ai-toolkit; a sentence for people."""


def read_config(content: bytes, name: str, *, environment: Mapping[str, str]) -> dict[str, Plain]:
    """The values of a config file.

    Args:
        content: the file.
        name: what it is called; `.json` is read as JSON, everything else as YAML.
        environment: what `${NAME}` is replaced by; other names stay as written.

    Raises:
        ConfigError: it is too large, too deep, or no mapping.
    """
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{name} has more than {MAX_CONFIG_BYTES} bytes; a training config has a few thousand")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is no text in UTF-8") from None
    text = _VARIABLE.sub(lambda found: environment.get(found[1], found[0]), text)
    parse: Callable[[str], Any] = _json if name.endswith(".json") else _yaml
    try:
        values = parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{name}: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} holds no settings")
    return values


def with_name(values: Plain, name: str) -> Plain:
    """All texts with `[name]` replaced by the job's name, keys included."""
    if isinstance(values, str):
        return values.replace("[name]", name)
    if isinstance(values, list):
        return [with_name(value, name) for value in values]
    if isinstance(values, dict):
        return {key.replace("[name]", name): with_name(value, name) for key, value in values.items()}
    return values


def unresolved(text: str) -> tuple[str, ...]:
    """The names of `${NAME}` that stand in a text."""
    return tuple(dict.fromkeys(_VARIABLE.findall(text)))


def _json(text: str) -> Plain:
    return _plain(json.loads(text), [MAX_NODES])


def _yaml(text: str) -> Plain:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {}, set(), 0)
        return _plain(loader.construct_document(node), [MAX_NODES])
    except yaml.YAMLError as error:
        raise ConfigError(f"no YAML that can be read: {_one_line(error)}") from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """The safe loader, with the trainer's numbers, that gives up early."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"nested more than {MAX_DEPTH} levels deep")
        if self._nodes > MAX_NODES:
            raise ConfigError(f"more than {MAX_NODES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# YAML 1.1 takes `1e-4` for text; ai-toolkit takes it for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+\Z"),
    list("-+.0123456789"),
)


def _expanded(node: Any, sizes: dict[int, int], open_nodes: set[int], depth: int) -> int:
    """How many values a node stands for, aliases spelt out.

    Raises:
        ConfigError: more than `MAX_NODES`, deeper than `MAX_DEPTH`, or a value that holds itself.
    """
    known = sizes.get(id(node))
    if known is not None:
        return known
    if id(node) in open_nodes:
        raise ConfigError("a value holds itself")
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARS:
            raise ConfigError("a number of more digits than a setting has")
        return 1
    open_nodes.add(id(node))
    children = (
        node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    )
    total = 1
    for child in children:
        total += _expanded(child, sizes, open_nodes, depth + 1)
        if total > MAX_NODES:
            raise ConfigError(f"aliases that stand for more than {MAX_NODES} values")
    open_nodes.discard(id(node))
    sizes[id(node)] = total
    return total


def _plain(value: Any, left: list[int], depth: int = 0) -> Plain:
    """The value as JSON would hold it: text keys, dates and the like as text."""
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"more than {MAX_NODES} values")
    if depth > MAX_DEPTH:
        raise ConfigError(f"nested more than {MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | set):
        return [_plain(item, left, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_key(key): _plain(item, left, depth + 1) for key, item in value.items()}
    return str(value)


def _key(key: Any) -> str:
    return (
        key
        if isinstance(key, str)
        else json.dumps(key)
        if isinstance(key, bool | int | float | None)
        else str(key)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

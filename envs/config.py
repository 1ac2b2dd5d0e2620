"""Configurations: frozen dataclasses filled from yaml, with errors that name the file, the key and the fix."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from simtoreal.envs.errors import ConfigError, closest

T = TypeVar("T")


class _OneValuePerKey(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key '{key.value}' is given twice, in lines {seen[key.value]} and {line}"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the plain values in yaml text.

    Raises:
        yaml.YAMLError: not valid, or a key is given twice in a mapping.
    """
    loader = _OneValuePerKey(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping stored in a yaml file (an empty file is an empty mapping).

    Raises:
        ConfigError: the file is missing, is not yaml, or does not hold a mapping.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid yaml: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of 'key: value' lines, found {type(content).__name__}")
    return content


def load_config(cls: type[T], path: Path) -> T:
    """Return ``cls`` (a dataclass) filled from a yaml file.

    Raises:
        ConfigError: names the file, the key, what was found and what was expected.
    """
    return build_config(cls, read_yaml(path), source=str(path))


def load_fields(cls: type, path: Path) -> dict[str, Any]:
    """Return the typed values of the fields of ``cls`` that a yaml file gives; it may leave out required ones.

    Raises:
        ConfigError: names the file, the key, what was found and what was expected.
    """
    return _fields(cls, read_yaml(path), str(path), "")


def build_config(cls: type[T], content: dict[str, Any], *, source: str) -> T:
    """Return ``cls`` (a dataclass) filled from a mapping of plain values, nested dataclasses included.

    Args:
        cls: dataclass to build.
        content: as read from yaml or JSON.
        source: where it comes from, for messages.

    Raises:
        ConfigError: unknown or missing key, or a value of the wrong type.
    """
    return _build(cls, content, source, "")  # type: ignore[no-any-return]


def _build(cls: type, content: Any, source: str, where: str) -> Any:
    if not isinstance(content, dict):
        raise ConfigError(
            f"{source}: '{where.rstrip('.')}' is {content!r}; expected a mapping with the fields of {cls.__name__}"
        )
    values = _fields(cls, content, source, where)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: key '{where}{missing[0]}' is missing (required by {cls.__name__})")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {where.rstrip('.') or cls.__name__}: {error}") from error


def _fields(cls: type, content: dict[str, Any], source: str, where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in content:
        if key not in known:
            raise ConfigError(f"{source}: unknown key '{where}{key}'. {closest(str(key), known)}")
    return {key: _convert(value, hints[key], source, f"{where}{key}") for key, value in content.items()}


def _convert(value: Any, hint: Any, source: str, where: str) -> Any:
    """Return ``value`` as the annotated type, or raise a :class:`ConfigError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(value, arguments[0], source, where)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, source, where)
    if origin is typing.Literal:
        if value not in arguments:
            names = [str(argument) for argument in arguments]
            raise ConfigError(f"{source}: '{where}' is {value!r}. {closest(str(value), names)}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, source, f"{where}.")
    if origin in (tuple, list, collections.abc.Sequence) or hint in (tuple, list):
        return _convert_sequence(value, hint, source, where)
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: '{where}' is {value!r}; expected a mapping")
        inner = arguments[1] if arguments else Any
        return {key: _convert(item, inner, source, f"{where}.{key}") for key, item in value.items()}
    return _convert_scalar(value, hint, source, where)


def _convert_union(value: Any, options: tuple[Any, ...], source: str, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(value, options[0], source, where)
    if isinstance(value, dict) and "type" in value:
        # Several dataclasses may stand here (kinds of policies): their default for ``type`` tells them apart.
        kinds = {
            str(field.default): option
            for option in options
            if dataclasses.is_dataclass(option)
            for field in dataclasses.fields(option)
            if field.name == "type"
        }
        if str(value["type"]) not in kinds:
            raise ConfigError(f"{source}: '{where}.type' is {value['type']!r}. {closest(str(value['type']), kinds)}")
        return _convert(value, kinds[str(value["type"])], source, where)
    problems = []
    for option in options:
        try:
            return _convert(value, option, source, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(f"{source}: '{where}' is {value!r}, which fits nothing it may be:\n  " + "\n  ".join(problems))


def _convert_sequence(value: Any, hint: Any, source: str, where: str) -> Any:
    arguments = typing.get_args(hint)
    wanted = list if list in (hint, typing.get_origin(hint)) else tuple
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{source}: '{where}' is {value!r}; expected a list")
    if wanted is tuple and arguments and arguments[-1] is not ... and typing.get_origin(hint) is tuple:
        if len(value) != len(arguments):
            raise ConfigError(f"{source}: '{where}' has {len(value)} values; expected {len(arguments)}")
        inner = list(arguments)
    else:
        inner = [arguments[0] if arguments else Any] * len(value)
    return wanted(
        _convert(item, item_hint, source, f"{where}[{index}]")
        for index, (item, item_hint) in enumerate(zip(value, inner, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, source: str, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # yaml 1.1 reads 1e-4 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, bool):
        raise ConfigError(f"{source}: '{where}' is {value!r}; expected int")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise ConfigError(f"{source}: '{where}' is {value!r} ({type(value).__name__}); expected {hint.__name__}")
    return value

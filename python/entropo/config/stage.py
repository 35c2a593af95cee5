"""How a stage's configuration is read: YAML, dotted overrides, and errors that say where and what instead.

Holds no stage's fields; those live one file per stage beside this one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from entropo.durable import write_text
from entropo.errors import ConfigError


class StageConfig(BaseModel):
    """Base of every configuration model, nested sections included.

    `foreign` maps keys of other tools (LLaMA-Factory, TRL, R2E-Gym) to ours: they fail with our name, never silently work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
    foreign: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Reads `path` (YAML, optional), applies `section.key=value` overrides (values are YAML), validates.

        Raises: ConfigError naming file, line and key, what was expected and the nearest known key.
        """
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        if path is not None:
            values, lines = _read_yaml(Path(path))
        for override in overrides:
            _apply_override(values, override)
        return cls.validated(values, file=path, lines=lines)

    @classmethod
    def validated(cls, values: Mapping[str, Any], *, file: str | Path | None = None, lines: Mapping[str, int] | None = None) -> Self:
        """Validates plain values; the first problem becomes one ConfigError."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(cls, error, file, lines or {}) from None

    def to_yaml(self) -> str:
        """The resolved configuration, every default filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Writes the resolved configuration beside an output."""
        write_text(path, self.to_yaml())


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice: the earlier one would be lost in silence."""


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such configuration file", file=path, hint="the shipped ones lie in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=path) from None
    try:
        node = yaml.compose(text, Loader=_UniqueKeyLoader)
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        message = f"is no valid YAML: {getattr(error, 'problem', None) or error}"
        raise ConfigError(message, file=path, line=mark.line + 1 if mark else None) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"holds a {type(values).__name__}, expected keys and values", file=path, line=1)
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, path)
    return values, lines


def _collect_lines(node: Any, prefix: str, lines: dict[str, int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"given twice, first on line {lines[name]}", file=path, line=line, key=name)
        lines[name] = line
        _collect_lines(value_node, f"{name}.", lines, path)


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override `{override}` has no `=`", hint="write overrides as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override value `{text}` is no valid YAML: {error}", key=name) from None
    if isinstance(value, str):
        value = _number_or_text(value)
    *sections, last = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"`{section}` is a value, not a section", key=name)
        values = inner
    values[last] = value


def _number_or_text(text: str) -> Any:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    try:
        return float(text) if any(character.isdigit() for character in text) else text
    except ValueError:
        return text


def _explain(
    model: type[BaseModel], error: ValidationError, file: str | Path | None, lines: Mapping[str, int]
) -> ConfigError:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    line = next((lines[".".join(location[:n])] for n in range(len(location), 0, -1) if ".".join(location[:n]) in lines), None)
    if problem["type"] == "extra_forbidden":
        section = _section_model(model, location[:-1])
        return ConfigError("unknown key", file=file, line=line, key=key, hint=_suggest(section, location[-1]))
    value = problem.get("input")
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" (found {value!r})" if isinstance(value, (str, int, float, bool)) else ""
    return ConfigError(f"{message}{shown}", file=file, line=line, key=key or None)


def _section_model(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for name in path:
        info = model.model_fields.get(name)
        annotation = info.annotation if info else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return model
        model = inner
    return model


def _suggest(model: type[BaseModel], key: str) -> str:
    foreign = getattr(model, "foreign", {})
    if key in foreign:
        return f"that key of another tool is called `{foreign[key]}` here"
    known = list(model.model_fields)
    near = difflib.get_close_matches(key, [*known, *foreign], n=1, cutoff=0.6)
    if near:
        return f"did you mean `{foreign.get(near[0], near[0])}`?"
    return f"known keys: {', '.join(known)}"

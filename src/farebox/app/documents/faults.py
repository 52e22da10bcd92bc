"""From what the validation library reports to faults a person can act on: a path, one line, a remedy.

A document is checked as a whole: every fault comes back at once, each with the path of the input it is about
(``routes[0].fares.exact.price``), as one ``Refused`` that carries all reasons.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ConfigDict
from pydantic_core import ErrorDetails, PydanticCustomError

from farebox.base.errors import Reason, Refused

#: A document with more faults than this is not described to the end.
FAULTS_MAX: Final = 100


class Document(BaseModel):
    """The base of every shape that comes from outside: unknown fields are faults, values are frozen.

    ``not_yet`` names fields of the public surface that a later release brings: giving one is refused with that reason
    instead of being silently ignored or called a misspelling.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)
    not_yet: ClassVar[Mapping[str, str]] = {}


def not_available_yet(what: str) -> PydanticCustomError:
    """The fault of asking for something the public surface names and this release does not do."""
    return PydanticCustomError("NOT_AVAILABLE_YET", "{what} not available yet: leave it out", {"what": what})


def fault(code: str, message: str) -> PydanticCustomError:
    """A fault with a code of our own, raised inside a validator. ``message`` is used as it is."""
    return PydanticCustomError(code, "{text}", {"text": message})


def from_refused(refused: Refused) -> PydanticCustomError:
    """The same refusal, in the form the validation library collects."""
    return fault(refused.reason.code, refused.reason.message)


def reasons(errors: Sequence[ErrorDetails] | Sequence[Any], model: Any, within: str = "") -> list[Reason]:
    """One ``Reason`` per fault; ``model`` is the type that was validated (for remedies that know its fields), ``within``
    the path of the document inside a larger one."""
    found: list[Reason] = []
    for detail in errors[:FAULTS_MAX]:
        location = tuple(detail["loc"])
        code, message = _described(detail, location, model)
        found.append(Reason(code, message, path_of(location, within) or None))
    return found


def path_of(location: Sequence[str | int], within: str = "") -> str:
    """``("routes", 0, "fares", "exact")`` → ``routes[0].fares.exact``. Branch marks of unions are left out."""
    path = within
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not _is_branch(step):
            path += f".{step}" if path else step
    return path


def branch(name: str) -> str:
    """The tag of a union's branch: marked, so that ``path_of`` can leave it out."""
    return f"‹{name}›"


def _is_branch(step: str) -> bool:
    return step.startswith("‹") or step == "[key]"


def _described(detail: Any, location: tuple[str | int, ...], model: Any) -> tuple[str, str]:
    kind, said = str(detail["type"]), str(detail["msg"])
    if kind.isupper():
        return kind, said
    if kind == "missing":
        return "FIELD_MISSING", f"{_last(location)} is missing: add it"
    if kind == "extra_forbidden":
        return _unknown_field(location, model)
    if kind in ("literal_error", "enum"):
        expected = str(detail["ctx"]["expected"])
        return "FIELD_MALFORMED", f"{_shown(detail['input'])} is not allowed here: write {expected}"
    remedy = _REMEDIES.get(kind)
    if remedy is not None:
        return "FIELD_MALFORMED", f"{_shown(detail['input'])} is {remedy}"
    text = said.removeprefix("Value error, ")
    return "FIELD_MALFORMED", text[:1].lower() + text[1:]


_REMEDIES: Final = {
    "string_type": "not text: write a string",
    "int_type": "not a whole number: write digits without a point or quotes",
    "int_parsing": "not a whole number: write digits only",
    "int_from_float": "not a whole number: write it without decimals",
    "bool_type": "neither true nor false: write one of them without quotes",
    "bool_parsing": "neither true nor false",
    "list_type": "not a list: write [ … ]",
    "dict_type": "not a mapping: write names with values",
    "model_type": "not a mapping: write names with values",
    "model_attributes_type": "not a mapping: write names with values",
    "tuple_type": "not a list: write [ … ]",
    "mapping_type": "not a mapping: write names with values",
}


def _unknown_field(location: tuple[str | int, ...], model: Any) -> tuple[str, str]:
    name = _last(location)
    owner = _type_at(model, location[:-1])
    if not (isinstance(owner, type) and issubclass(owner, BaseModel)):
        return "FIELD_UNKNOWN", f"there is no field {name!r} here: remove it"
    later = getattr(owner, "not_yet", {}).get(name)
    if later is not None:
        return "NOT_AVAILABLE_YET", f"{later} not available yet: leave {name} out"
    known = [n for n in _field_names(owner) if n != "idempotency_key"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]!r}?" if near else f"what may stand here is {', '.join(known)}"
    return "FIELD_UNKNOWN", f"there is no field {name!r} here: {remedy}"


def _field_names(owner: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, info in owner.model_fields.items():
        names.append(_alias_names(info.validation_alias, name)[0])
    return names


def _alias_names(alias: Any, name: str) -> list[str]:
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [alias] if isinstance(alias, str) else [name]


def _type_at(annotation: Any, location: Sequence[str | int]) -> Any:
    """The type of the value at a location inside a type; None when it cannot be told."""
    current = _bare(annotation)
    for step in location:
        if isinstance(step, str) and _is_branch(step):
            current = _branch_of(current, step)
        elif isinstance(current, type) and issubclass(current, BaseModel):
            current = next(
                (
                    _bare(
                        info.annotation if not info.metadata else Annotated[info.annotation, *info.metadata]
                    )
                    for name, info in current.model_fields.items()
                    if step == name or step in _alias_names(info.validation_alias, name)
                ),
                None,
            )
        else:
            arguments = get_args(current)
            current = _bare(arguments[-1 if get_origin(current) is dict else 0]) if arguments else None
    return current


def _bare(annotation: Any) -> Any:
    """Without ``Annotated`` and without ``| None``."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    options = [a for a in get_args(annotation) if a is not type(None)]
    is_optional = type(None) in get_args(annotation)
    return _bare(options[0]) if is_optional and len(options) == 1 else annotation


def _branch_of(union: Any, step: str) -> Any:
    for option in get_args(union) if get_origin(union) in (Union, type(int | str)) else ():
        if any(getattr(mark, "tag", None) == step for mark in get_args(option)[1:]):
            return _bare(option)
    return None


def _last(location: Sequence[str | int]) -> str:
    return str(location[-1]) if location else "the document"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"

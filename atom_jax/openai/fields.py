"""Which fields a JSON object of the API may have: a list of all, and every other one is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

from atom_jax.errors import did_you_mean

# How many of the wrong fields of one object an error names, and how many characters of each name.
_MOST_NAMED = 8
_MOST_CHARACTERS = 64


class Fields(BaseModel):
    """An object whose fields are all known. Values are strict: ``"0.7"`` is not a number.

    A field that changes nothing about the answer is accepted and left out. A field that would change it, but
    is not supported, is accepted with the values that change nothing. Every other field is an error.

    Attributes:
      no_effect: names of the fields that change nothing, whatever their value is.
      unsupported: for each field that is not supported, the values that change nothing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    no_effect: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        """The supported fields of ``data``.

        Raises:
          PydanticCustomError: there is a field that is not known, or not supported.
        """
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.unsupported.items():
            if name in data and not any(_same(data[name], value) for value in neutral):
                raise field_error(name, "is not supported; leave it out")
        known = cls.names()
        unknown = data.keys() - known - cls.no_effect - cls.unsupported.keys()
        if unknown:
            named = [name for name in data if name in unknown][:_MOST_NAMED]
            raise field_error(named[0][:_MOST_CHARACTERS], "; ".join(map(cls._unknown, named)))
        return {name: value for name, value in data.items() if name in known}

    @classmethod
    def names(cls) -> frozenset[str]:
        """The names of the supported fields, as JSON has them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def _unknown(cls, name: str) -> str:
        shown = name[:_MOST_CHARACTERS]
        return f"there is no field {shown!r} here{did_you_mean(shown, cls.names())}"

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        """The schema, with the fields that have no effect or only neutral values."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, neutral in cls.unsupported.items():
            properties[name] = {"enum": list(neutral), "description": "Not supported: neutral values only."}
        for name in sorted(cls.no_effect):
            properties[name] = {"description": "Accepted; changes nothing."}
        return schema


def field_error(field: str, reason: str) -> PydanticCustomError:
    """What a validator raises if ``field`` is wrong, although its type is right."""
    return PydanticCustomError("refused", "{reason}", {"field": field, "reason": reason})


def _same(value: object, neutral: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)

"""What the sections of a config have in common, and the types of their values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
GroupedConvWay = Annotated[str, Field(pattern=r"^(auto|grouped|split|merged[1-9][0-9]{0,3})$")]
PerChannel = tuple[float, float, float]


class Section(BaseModel):
    """A group of keys: frozen, strict (no string for a number, no boolean for an integer), nothing unknown."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

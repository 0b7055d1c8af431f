"""Configuration of the OpenAI-compatible endpoints."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from rollmesh.config import Config


class OpenAiConfig(Config):
    """Bounds of the OpenAI-compatible endpoints, and how long they remember what was drawn."""

    max_body_bytes: PositiveInt = 4 * 2**20
    """Largest body of a request; a larger one is refused with 413."""
    max_messages: PositiveInt = 1000
    """Messages of one chat."""
    max_tools: PositiveInt = 128
    """Tools that one request tells the model of."""
    max_choices: Annotated[PositiveInt, Field(le=1024)] = 128
    """Completions of one request: `n`, times the number of prompts."""
    max_models: PositiveInt = 1000
    """Models that /v1/models lists; each of the others can still be named."""
    keep_turns: bool = True
    """Whether GET /v1/turns/ID answers the token ids and log-probabilities of what was drawn. They
    are records of the project, and count against its max_records."""
    turn_retention_s: Annotated[float, Field(gt=0, le=30 * 86400.0)] = 3600.0
    """For how long it does."""
    max_turn_bytes: PositiveInt = 8 * 2**20
    """Largest turn that is kept, as JSON; a token takes some 20 bytes."""

"""Whether completions are of the policy that was asked for: each token says which one drew it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rollmesh import types


def check_identity(
    completions: Sequence[types.Completion],
    source: types.AdapterSource,
    num_completions: int,
    possible: Mapping[int, str],
) -> None:
    """Refuse completions that are not, token for token, of the version that was asked for.

    `possible`: digests by version of that and of what may have followed it, in this order.

    Training on another policy's tokens goes wrong silently, weeks before anyone looks here.

    Raises:
        InternalError: names what came.
    """
    if len(completions) != num_completions:
        raise InternalError(
            f"{num_completions} completions were asked for, {len(completions)} came"
        )
    for index, completion in enumerate(completions):
        num_tokens = sum(span.num_tokens for span in completion.spans)
        if not 0 < num_tokens == len(completion.token_ids) == len(completion.logprobs):
            raise InternalError(
                f"completion {index} has {len(completion.token_ids)} tokens, "
                f"{len(completion.logprobs)} logprobs and spans over {num_tokens} tokens"
            )
        at_least = source.policy_version
        for span in completion.spans:
            version = span.policy_version
            if version < at_least or possible.get(version) != span.digest:
                raise InternalError(
                    f"version {source.policy_version} of {source.adapter} (digest "
                    f"{source.digest!r}) was asked for; {span.num_tokens} tokens of completion "
                    f"{index} came from version {version} (digest {span.digest!r})",
                    adapter=source.adapter,
                )
            at_least = version

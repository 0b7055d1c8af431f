"""Protobuf messages to the values of `rollmesh.types` and `rollmesh.job`, and back.

What a message cannot say rightly (a tensor whose bytes do not fill its shape, an enum left
unspecified) is an InvalidRequest that names the field. Ranges are the cores' business.
"""

from rollmesh.convert.adapters import (
    adapter_from_pb,
    adapter_to_pb,
    export_header_from_pb,
    export_header_to_pb,
    export_part_from_pb,
    sampler_info_from_pb,
    sampler_info_to_pb,
    trainer_adapter_from_pb,
    trainer_adapter_to_pb,
    trainer_info_from_pb,
    trainer_info_to_pb,
)
from rollmesh.convert.fleet import (
    fleet_from_pb,
    fleet_to_pb,
    score_items_from_pb,
    score_items_to_pb,
)
from rollmesh.convert.jobs import (
    event_from_pb,
    event_to_pb,
    job_from_pb,
    job_to_pb,
    spec_from_pb,
    spec_to_pb,
)
from rollmesh.convert.policies import (
    lora_from_pb,
    lora_to_pb,
    optional_source_from_pb,
    policy_from_pb,
    policy_to_pb,
    source_from_pb,
    source_to_pb,
    span_from_pb,
    span_to_pb,
)
from rollmesh.convert.sampling import (
    chunk_from_pb,
    chunk_to_pb,
    logprobs_from_pb,
    logprobs_to_pb,
    params_from_pb,
    params_to_pb,
)
from rollmesh.convert.tensors import floats_from_pb, tensor_from_pb, tensor_to_pb
from rollmesh.convert.training import (
    adam_from_pb,
    adam_to_pb,
    arrays_from_pb,
    arrays_to_pb,
    data_from_pb,
    datum_to_pb,
    loss_from_pb,
    loss_to_pb,
)
from rollmesh.convert.values import struct_from_pb, struct_to_pb, time_from_pb, time_to_pb

__all__ = [
    "adam_from_pb",
    "adam_to_pb",
    "adapter_from_pb",
    "adapter_to_pb",
    "arrays_from_pb",
    "arrays_to_pb",
    "chunk_from_pb",
    "chunk_to_pb",
    "data_from_pb",
    "datum_to_pb",
    "event_from_pb",
    "event_to_pb",
    "export_header_from_pb",
    "export_header_to_pb",
    "export_part_from_pb",
    "fleet_from_pb",
    "fleet_to_pb",
    "floats_from_pb",
    "job_from_pb",
    "job_to_pb",
    "logprobs_from_pb",
    "logprobs_to_pb",
    "lora_from_pb",
    "lora_to_pb",
    "loss_from_pb",
    "loss_to_pb",
    "optional_source_from_pb",
    "params_from_pb",
    "params_to_pb",
    "policy_from_pb",
    "policy_to_pb",
    "sampler_info_from_pb",
    "sampler_info_to_pb",
    "score_items_from_pb",
    "score_items_to_pb",
    "source_from_pb",
    "source_to_pb",
    "span_from_pb",
    "span_to_pb",
    "spec_from_pb",
    "spec_to_pb",
    "struct_from_pb",
    "struct_to_pb",
    "tensor_from_pb",
    "tensor_to_pb",
    "time_from_pb",
    "time_to_pb",
    "trainer_adapter_from_pb",
    "trainer_adapter_to_pb",
    "trainer_info_from_pb",
    "trainer_info_to_pb",
]

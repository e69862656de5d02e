from __future__ import annotations

import numpy as np
import torch

from dspark.engine.gpu.transfer import Field, PackedBuffer

FIELDS = {
    "flag": Field(torch.bool, (3,)),
    "key": Field(torch.int64, (2,)),
    "rows": Field(torch.float32, (2, 3)),
    "tail": Field(torch.int64, (4,)),
}


def test_fields_of_every_type_cross_in_both_directions() -> None:
    buffer = PackedBuffer(torch.device("cpu"), FIELDS, turns=2)
    host = buffer.host(0)
    host["flag"][:] = [True, False, True]
    host["key"][:] = [-(2**63), 2**63 - 1]
    host["rows"][:] = np.arange(6).reshape(2, 3) / 7
    buffer.upload(0, "tail", 0)
    assert buffer.device["flag"].tolist() == [True, False, True]
    assert buffer.device["key"].tolist() == [-(2**63), 2**63 - 1]
    buffer.device["rows"].mul_(2)
    buffer.download(1)
    np.testing.assert_array_equal(buffer.host(1)["rows"], (np.arange(6).reshape(2, 3) / 7).astype(np.float32) * 2)
    np.testing.assert_array_equal(buffer.host(3)["key"], host["key"])


def test_only_what_is_used_of_the_last_field_is_copied() -> None:
    buffer = PackedBuffer(torch.device("cpu"), FIELDS, turns=1)
    buffer.host(0)["tail"][:] = [1, 2, 3, 4]
    buffer.upload(0, "tail", 16)
    assert buffer.device["tail"].tolist() == [1, 2, 0, 0]


def test_a_turn_does_not_touch_the_host_side_of_another() -> None:
    buffer = PackedBuffer(torch.device("cpu"), FIELDS, turns=2)
    buffer.host(0)["key"][:], buffer.host(1)["key"][:] = 1, 2
    buffer.upload(1, "tail", 0)
    assert buffer.host(2)["key"].tolist() == [1, 1]
    assert buffer.device["key"].tolist() == [2, 2]

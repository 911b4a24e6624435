from typing import Any

import pytest
import torch._inductor.config
from torch._inductor.codegen.multi_kernel import MultiKernelCall

from lorafleet.serve.engine.regions import compiling

VARIABLE = "TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE"


class FromTheCache:
    """A kernel as torch 2.11 takes it from its cache: asking for its key fails."""

    @property
    def fn(self) -> Any:
        raise TypeError("'NoneType' object does not support the context manager protocol")


def test_a_second_start_does_not_ask_for_choices_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")  # so that it is put back
    with compiling(1), pytest.raises(TypeError):  # whoever sets it has the say
        MultiKernelCall("normalisation", [FromTheCache()], {})
    monkeypatch.delenv(VARIABLE)
    with compiling(1):
        assert torch._inductor.config.triton.multi_kernel == 1
        MultiKernelCall("normalisation", [FromTheCache()], {})

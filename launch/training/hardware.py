"""Facts about the hardware, for the choices and reports that depend on them."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator

from ds_agsel import processor


def bf16_is_fast() -> bool:
    """Return whether bf16 pays here: on accelerators that have it, and on CPUs with instructions for it."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return bool(accelerator.is_bf16_supported())
    return processor.has_bf16()

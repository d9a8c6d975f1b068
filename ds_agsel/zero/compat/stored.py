"""The classes of DeepSpeed's that its checkpoint files hold, as objects rather than as plain data (0.19.8)."""

from __future__ import annotations

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ds_agsel.zero.compat.versions import until

# Loss scale, stage and slices are in the optimizer's files; the enums may also stand in the ds_config that both hold.
STORED_CLASSES: tuple[type, ...] = (
    LossScaler,
    DynamicLossScaler,
    ZeroStageEnum,
    OffloadDeviceEnum,
    fragment_address,
)
if not until("0.18.5"):
    from deepspeed.runtime.fp16.loss_scaler import LossScaleProfile

    STORED_CLASSES = (*STORED_CLASSES, LossScaleProfile)

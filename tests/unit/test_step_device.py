"""Where AdamW runs, by what the section, the ds_config and the memory say."""

from __future__ import annotations

import pytest

from ds_agsel.zero.step_device import Situation, StepDevice, decide

ROOMY = Situation(offloads=False, can_offload=True, has_own_memory=True, needed_bytes=900, available_bytes=1000)


def but(**changes: object) -> Situation:
    return Situation(**{**vars(ROOMY), **changes})


@pytest.mark.parametrize(
    ("wanted", "now", "choice", "reason"),
    [
        (None, ROOMY, StepDevice.VISIT, "need 900 bytes of the accelerator, of which 1000 are free"),
        (None, but(available_bytes=899), StepDevice.HOST, "need 900 bytes of the accelerator, and 899 are free"),
        (None, but(available_bytes=899, can_offload=False), StepDevice.VISIT, "of which 899 are free"),
        (None, but(offloads=True), StepDevice.HOST, "offload_optimizer"),
        ("cpu", but(offloads=True), StepDevice.HOST, "offload_optimizer"),
        (None, but(has_own_memory=False), StepDevice.STAY, "the accelerator is the processor"),
        ("accelerator", but(has_own_memory=False), StepDevice.VISIT, "step_device is 'accelerator'"),
    ],
)
def test_the_step_runs_where_it_can_and_says_why(wanted, now, choice, reason):
    decided, why = decide(wanted, now)
    assert decided is choice
    assert reason in why

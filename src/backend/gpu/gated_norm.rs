//! The gated norm after the delta rule: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _y: &mut Tensor,
    _rstd: &mut Tensor,
    _o: &Tensor,
    _qkvz: &Tensor,
    _weight: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "gated_rms_norm_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_o: &mut Tensor,
    _d_qkvz: &mut Tensor,
    _d_y: &Tensor,
    _o: &Tensor,
    _rstd: &Tensor,
    _qkvz: &Tensor,
    _weight: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "gated_rms_norm_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

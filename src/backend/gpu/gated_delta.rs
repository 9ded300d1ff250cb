//! The gated delta rule: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _o: &mut Tensor,
    _u: &Tensor,
    _g: &Tensor,
    _beta: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "gated_delta_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_u: &mut Tensor,
    _d_g: &mut Tensor,
    _d_beta: &mut Tensor,
    _d_o: &Tensor,
    _u: &Tensor,
    _g: &Tensor,
    _beta: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "gated_delta_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

//! RMS norms: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{GradOut, NormSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _out: &mut Tensor,
    _rstd: &mut Tensor,
    _x: &Tensor,
    _weight: &Tensor,
    _spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "rms_norm_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn add_forward(
    _: &Gpu,
    _sum: &mut Tensor,
    _out: &mut Tensor,
    _rstd: &mut Tensor,
    _x: &Tensor,
    _delta: &Tensor,
    _weight: &Tensor,
    _spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "add_rms_norm_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_x: GradOut<'_>,
    _d_out: &Tensor,
    _x: &Tensor,
    _rstd: &Tensor,
    _weight: &Tensor,
    _spec: NormSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "rms_norm_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

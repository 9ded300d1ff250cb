//! Projections: frozen matrices with their adapters: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{GradOut, Linear, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _outs: &mut [&mut Tensor],
    _xa: &mut Tensor,
    _x: &Tensor,
    _linears: &[&Linear],
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "linear_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_x: GradOut<'_>,
    _d_lora: &mut Tensor,
    _d_outs: &[&Tensor],
    _x: &Tensor,
    _xa: &Tensor,
    _linears: &[&Linear],
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "linear_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn swiglu_forward(
    _: &Gpu,
    _h: &mut Tensor,
    _gate: &mut Tensor,
    _up: &mut Tensor,
    _xa: &mut Tensor,
    _x: &Tensor,
    _linears: [&Linear; 2],
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "linear_swiglu_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

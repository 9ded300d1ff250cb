//! What feeds the delta rule: causal convolution, gates: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{DeltaSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn conv_forward(
    _: &Gpu,
    _u: &mut Tensor,
    _qkvz: &Tensor,
    _weight: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "causal_conv_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn conv_backward(
    _: &Gpu,
    _d_qkvz: &mut Tensor,
    _d_u: &Tensor,
    _qkvz: &Tensor,
    _weight: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "causal_conv_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gates_forward(
    _: &Gpu,
    _g: &mut Tensor,
    _beta: &mut Tensor,
    _ba: &Tensor,
    _a_log: &Tensor,
    _dt_bias: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "delta_gates_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gates_backward(
    _: &Gpu,
    _d_ba: &mut Tensor,
    _d_g: &Tensor,
    _d_beta: &Tensor,
    _ba: &Tensor,
    _a_log: &Tensor,
    _dt_bias: &Tensor,
    _spec: DeltaSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "delta_gates_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

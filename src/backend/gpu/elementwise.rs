//! Embedding, SwiGLU, the shared expert's gate: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::StepState;
use crate::store::Weight;
use crate::tensor::Tensor;

pub(super) fn embedding_forward(
    _: &Gpu,
    _out: &mut Tensor,
    _table: &Weight,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "embedding_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn swiglu_backward(
    _: &Gpu,
    _d_gate: &mut Tensor,
    _d_up: &mut Tensor,
    _d_h: &Tensor,
    _gate: &Tensor,
    _up: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "swiglu_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn shared_add_forward(
    _: &Gpu,
    _out: &mut Tensor,
    _shared: &Tensor,
    _logit: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "shared_expert_add_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn shared_add_backward(
    _: &Gpu,
    _d_shared: &mut Tensor,
    _d_logit: &mut Tensor,
    _d_out: &Tensor,
    _shared: &Tensor,
    _logit: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "shared_expert_add_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

//! Softmax attention and its output gate: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _o: &mut Tensor,
    _lse: &mut Tensor,
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "attention_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_q: &mut Tensor,
    _d_k: &mut Tensor,
    _d_v: &mut Tensor,
    _d_o: &Tensor,
    _o: &Tensor,
    _lse: &Tensor,
    _q: &Tensor,
    _k: &Tensor,
    _v: &Tensor,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "attention_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_forward(
    _: &Gpu,
    _y: &mut Tensor,
    _o: &Tensor,
    _q_proj: &Tensor,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "attention_gate_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_backward(
    _: &Gpu,
    _d_o: &mut Tensor,
    _d_q_proj: &mut Tensor,
    _d_y: &Tensor,
    _o: &Tensor,
    _q_proj: &Tensor,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "attention_gate_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

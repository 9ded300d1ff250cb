//! Norm of q and k per head, rotary embedding: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, QkWeights, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _q: &mut Tensor,
    _k: &mut Tensor,
    _q_rstd: &mut Tensor,
    _k_rstd: &mut Tensor,
    _q_proj: &Tensor,
    _k_proj: &Tensor,
    _weights: QkWeights<'_>,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "qk_norm_rope_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_q_proj: &mut Tensor,
    _d_k_proj: &mut Tensor,
    _d_q: &Tensor,
    _d_k: &Tensor,
    _q_proj: &Tensor,
    _k_proj: &Tensor,
    _q_rstd: &Tensor,
    _k_rstd: &Tensor,
    _weights: QkWeights<'_>,
    _spec: AttentionSpec,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "qk_norm_rope_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

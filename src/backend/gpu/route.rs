//! Routing of a mixture of experts: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{Routing, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward(
    _: &Gpu,
    _routing: &mut Routing,
    _logits: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_route_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn backward(
    _: &Gpu,
    _d_logits: &mut Tensor,
    _d_topk_weights: &Tensor,
    _logits: &Tensor,
    _routing: &Routing,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_route_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

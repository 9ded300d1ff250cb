//! Head and cross-entropy: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{GradOut, StepState};
use crate::store::Weight;
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn forward_backward(
    _: &Gpu,
    _token_loss: &mut Tensor,
    _d_x: GradOut<'_>,
    _x: &Tensor,
    _head: &Weight,
    _vocab_size: usize,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "linear_cross_entropy".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

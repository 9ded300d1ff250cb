//! `AdamW` over the flat arena: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{AdamWStep, UpdateReport};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn step(
    _: &Gpu,
    _params: &mut Tensor,
    _exp_avg: &mut Tensor,
    _exp_avg_sq: &mut Tensor,
    _grads: &mut Tensor,
    _token_loss: &Tensor,
    _step: AdamWStep,
) -> Result<UpdateReport> {
    Err(Error::Unsupported {
        what: "adamw".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

//! The routed experts: grouped products with their adapters: launchers.

use super::Gpu;
use crate::error::{Error, Result};
use crate::ops::{Experts, GradOut, Routing, StepState};
use crate::tensor::Tensor;

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_forward(
    _: &Gpu,
    _h: &mut Tensor,
    _gate: &mut Tensor,
    _up: &mut Tensor,
    _xa: &mut Tensor,
    _x: &Tensor,
    _routing: &Routing,
    _experts: &Experts,
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_gate_up_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn gate_up_backward(
    _: &Gpu,
    _d_x: GradOut<'_>,
    _d_lora: &mut Tensor,
    _d_routed: &mut Tensor,
    _d_h: &Tensor,
    _gate: &mut Tensor,
    _up: &mut Tensor,
    _xa: &Tensor,
    _x: &Tensor,
    _routing: &Routing,
    _experts: &Experts,
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_gate_up_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_forward(
    _: &Gpu,
    _out: &mut Tensor,
    _expert_out: &mut Tensor,
    _xa: &mut Tensor,
    _h: &Tensor,
    _routing: &Routing,
    _experts: &Experts,
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_down_forward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

#[expect(clippy::too_many_arguments, reason = "the op's own list")]
pub(super) fn down_backward(
    _: &Gpu,
    _d_h: &mut Tensor,
    _d_topk_weights: &mut Tensor,
    _d_lora: &mut Tensor,
    _d_out: &Tensor,
    _h: &Tensor,
    _xa: &Tensor,
    _routing: &Routing,
    _experts: &Experts,
    _lora: &Tensor,
    _state: &StepState,
) -> Result<()> {
    Err(Error::Unsupported {
        what: "moe_down_backward".to_owned(),
        why: "it has no kernel yet".to_owned(),
    })
}

//! What kernels are to reach.

/// Share of the roofline that is the goal for an op, by the beginning of its name. From goals in time or rate on an H200 (4.3 TB/s,
/// 790 TFLOP/s), Qwen3-Next-80B: experts' forward at 16,384 tokens 2.1 ms of a limit of 1.30, their gradients with those of the
/// adapters 3.0 of 1.61; attention with heads of 256 at 8,192 tokens 560 and 400 TFLOP/s; delta rule at 8,192 tokens 0.25 ms of
/// 0.063 and 0.75 of 0.158; head and loss at 8,192 targets 17 ms of 12.9; AdamW 10 ms of 8.4; linear layers as the experts.
const GOALS: [(&str, f64); 10] = [
    ("moe_gate_up_forward", 0.62),
    ("moe_down_forward", 0.62),
    ("moe_gate_up_backward", 0.54),
    ("moe_down_backward", 0.54),
    ("attention_forward", 0.71),
    ("attention_backward", 0.51),
    ("gated_delta_forward", 0.25),
    ("gated_delta_backward", 0.21),
    ("linear_cross_entropy", 0.76),
    ("adamw", 0.84),
];
/// The goal for linear layers: that of the experts' forward.
const LINEAR: f64 = 0.62;

/// Share of the roofline that is the goal for `op`; `None`: it has none of its own.
pub(super) fn goal(op: &str) -> Option<f64> {
    let own = GOALS.iter().find(|(name, _)| *name == op);
    let linear = op.starts_with("linear_") && op != "linear_cross_entropy";
    own.map(|(_, share)| *share)
        .or_else(|| linear.then_some(LINEAR))
}

//! Every op case on every device that needs no GPU: the CPU, and the emulated device in three thread orders.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test's helper fails its test"
)]

use std::time::Instant;

use brightrun::backend::cpu::Cpu;
use brightrun::selftest::{Subject, cases, cases_of};

/// Runs the cases whose op begins with `prefix`.
fn check(prefix: &str) {
    let cases = cases_of(prefix);
    assert!(!cases.is_empty(), "there is no case of {prefix}");
    let subjects = [Subject::new(Box::new(Cpu::new())), Subject::emu().unwrap()];
    let mut failures = Vec::new();
    for case in &cases {
        let begun = Instant::now();
        let results = subjects.iter().map(|subject| case.check(subject));
        failures.extend(results.filter_map(|result| Some(result.err()?.to_string())));
        if std::env::var_os("SELFTEST_VERBOSE").is_some() {
            eprintln!("{:6.2} s {case:?}", begun.elapsed().as_secs_f64());
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

macro_rules! families {
    ($($test:ident: $prefix:literal),* $(,)?) => {
        $(#[test] fn $test() { check($prefix); })*

        #[test]
        fn every_op_has_a_test() {
            let prefixes = [$($prefix),*];
            for case in cases() {
                assert!(prefixes.iter().any(|prefix| case.op.starts_with(prefix)), "{case:?}");
            }
        }
    };
}

families! {
    rms_norm: "rms_norm",
    add_rms_norm: "add_rms_norm",
    embedding: "embedding",
    swiglu: "swiglu",
    shared_expert: "shared_expert",
    linear_forward: "linear_forward",
    linear_backward: "linear_backward",
    linear_swiglu: "linear_swiglu",
    qk_norm_rope: "qk_norm_rope",
    attention_forward: "attention_forward",
    attention_backward: "attention_backward",
    attention_gate: "attention_gate",
    causal_conv: "causal_conv",
    delta_gates: "delta_gates",
    gated_delta_forward: "gated_delta_forward",
    gated_delta_backward: "gated_delta_backward",
    gated_rms_norm: "gated_rms_norm",
    moe_route: "moe_route",
    moe_gate_up: "moe_gate_up",
    moe_down: "moe_down",
    linear_cross_entropy: "linear_cross_entropy",
    adamw: "adamw",
    nf4: "nf4",
}

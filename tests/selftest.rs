//! Every op case on every device that needs no GPU: the CPU, and the emulated device in three thread orders.

#![cfg(feature = "emu")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test's helper fails its test"
)]

mod common;

use std::sync::Arc;
use std::time::Instant;

use brightrun::backend::cpu::Cpu;
use brightrun::backend::gpu::Gpu;
use brightrun::backend::gpu::driver::emu::Emu;
use brightrun::selftest::{Case, cases};
use common::device::ORDERS;

/// Runs the cases whose op begins with `prefix`.
fn check(prefix: &str) {
    let cases: Vec<Case> = cases()
        .into_iter()
        .filter(|case| case.op.starts_with(prefix))
        .collect();
    assert!(!cases.is_empty(), "there is no case of {prefix}");
    let failures: Vec<String> = cases.iter().flat_map(failures_of).collect();
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

fn failures_of(case: &Case) -> Vec<String> {
    let begun = Instant::now();
    let mut failures = Vec::new();
    if let Err(error) = case.check(&Cpu::new()) {
        failures.push(format!("cpu: {error}"));
    }
    let mut first = None;
    // Sanitizers look at accesses, which are the same in every order.
    let orders = if cfg!(kernels_sanitized) {
        &ORDERS[..1]
    } else {
        &ORDERS[..]
    };
    for &order in orders {
        let gpu = Gpu::new(Arc::new(Emu::new(order))).unwrap();
        let found = match case.run(&gpu) {
            Ok(found) => found,
            Err(error) => {
                failures.push(format!("emu {order:?}: {}: {error}", case.name()));
                continue;
            }
        };
        match &first {
            None => {
                if let Err(error) = case.compare(&found, true) {
                    failures.push(format!("emu: {error}"));
                }
                first = Some(found);
            }
            Some(first) if *first == found => {}
            Some(_) => failures.push(format!("emu {order:?}: {} has other bits", case.name())),
        }
    }
    if std::env::var_os("SELFTEST_VERBOSE").is_some() {
        eprintln!("{:6.2} s {case:?}", begun.elapsed().as_secs_f64());
    }
    failures
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

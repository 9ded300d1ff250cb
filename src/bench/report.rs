//! What was measured, for people and for machines.

use serde_json::{Value, json};

use super::{KernelRow, Roofline, Settings, StepResult};

/// The limits of a device as lines: measured, and by its data sheet where that is known.
pub fn roofline_text(name: &str, measured: Roofline) -> String {
    let line = |of: Roofline, what: &str| {
        let (bandwidth, flops) = (of.bandwidth / 1e9, of.flops / 1e12);
        format!("roofline: {bandwidth:.1} GB/s, {flops:.3} TFLOP/s, {what}\n")
    };
    let mut text = line(measured, "measured");
    if let Some(sheet) = Roofline::data_sheet(name) {
        text.push_str(&line(sheet, "by the data sheet"));
    }
    text
}

/// The limits of a device.
pub fn roofline_json(name: &str, measured: Roofline) -> Value {
    let sheet = Roofline::data_sheet(name);
    json!({
        "bandwidth_bytes_per_s": measured.bandwidth,
        "flops_per_s": measured.flops,
        "data_sheet_bandwidth_bytes_per_s": sheet.map(|sheet| sheet.bandwidth),
        "data_sheet_flops_per_s": sheet.map(|sheet| sheet.flops),
    })
}

/// A table of ops.
pub fn kernels_text(model: &str, rows: &[KernelRow], settings: &Settings) -> String {
    let mut text = format!(
        "\n{model}: {} tokens in sequences of {}\n{:<26}{:<34}{:>6}{:>11}{:>10}{:>11}{:>11}{:>10}{:>11}{:>8}{:>7}\n",
        settings.tokens,
        settings.sequence_len,
        "op",
        "shape",
        "calls",
        "GFLOP",
        "MB",
        "ms",
        "iqr ms",
        "GB/s",
        "TFLOP/s",
        "share",
        "goal",
    );
    for row in rows {
        let seconds = row.times.median_s;
        let goal = row.goal.map(|goal| format!("{:.0}%", 1e2 * goal));
        text.push_str(&format!(
            "{:<26}{:<34}{:>6}{:>11.3}{:>10.2}{:>11.3}{:>11.3}{:>10.1}{:>11.3}{:>7.0}%{:>7}\n",
            row.op,
            row.shape,
            row.calls,
            row.cost.flops as f64 / 1e9,
            row.cost.bytes as f64 / 1e6,
            1e3 * seconds,
            1e3 * row.times.iqr_s,
            row.cost.bytes as f64 / seconds / 1e9,
            row.cost.flops as f64 / seconds / 1e12,
            1e2 * row.share,
            goal.unwrap_or_default(),
        ));
    }
    text
}

/// An op of `model`.
pub fn row_json(model: &str, row: &KernelRow) -> Value {
    json!({
        "model": model,
        "op": row.op,
        "shape": row.shape,
        "calls": row.calls,
        "flops": row.cost.flops,
        "bytes": row.cost.bytes,
        "median_ms": 1e3 * row.times.median_s,
        "iqr_ms": 1e3 * row.times.iqr_s,
        "gb_per_s": row.cost.bytes as f64 / row.times.median_s / 1e9,
        "tflop_per_s": row.cost.flops as f64 / row.times.median_s / 1e12,
        "share_of_roofline": row.share,
        "goal_share": row.goal,
    })
}

/// A step and its ops.
pub fn step_text(model: &str, found: &StepResult, settings: &Settings) -> String {
    let buffers = found.buffer_bytes as f64 / 1e6;
    let memory = match found.device_bytes {
        Some(taken) => format!(
            "{:.1} MB of the device, {buffers:.1} MB of them buffers",
            taken as f64 / 1e6
        ),
        None => format!("{buffers:.1} MB of buffers; base weights are not counted"),
    };
    let mut text = format!(
        "{model}, {} layers: {} tokens in sequences of {}, {} adapter parameters, activations {}\n\
         step      {:.2} ms (iqr {:.2})\n\
         speed     {:.0} tokens/s, {:.3} TFLOP/s\n\
         memory    {memory}\n\
         loss      {:.4}\n{:<26}{:>6}{:>11}{:>8}\n",
        settings.layers,
        settings.tokens,
        settings.sequence_len,
        found.num_parameters,
        if found.recompute {
            "recomputed"
        } else {
            "kept"
        },
        1e3 * found.times.median_s,
        1e3 * found.times.iqr_s,
        found.tokens_per_s,
        found.flops_per_s / 1e12,
        found.loss,
        "op",
        "calls",
        "ms",
        "share",
    );
    for share in &found.shares {
        text.push_str(&format!(
            "{:<26}{:>6}{:>11.3}{:>7.1}%\n",
            share.op,
            share.calls,
            1e3 * share.seconds,
            1e2 * share.share
        ));
    }
    text
}

/// A step and its ops.
pub fn step_json(found: &StepResult) -> Value {
    let shares = found.shares.iter().map(|share| {
        json!({"op": share.op, "calls": share.calls, "seconds": share.seconds, "share": share.share})
    });
    json!({
        "median_ms": 1e3 * found.times.median_s,
        "iqr_ms": 1e3 * found.times.iqr_s,
        "tokens_per_s": found.tokens_per_s,
        "step_flops": found.flops,
        "tflop_per_s": found.flops_per_s / 1e12,
        "loss": found.loss,
        "num_parameters": found.num_parameters,
        "recomputed": found.recompute,
        "buffer_bytes": found.buffer_bytes,
        "device_bytes": found.device_bytes,
        "rows": shares.collect::<Vec<_>>(),
    })
}

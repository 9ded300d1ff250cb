//! A plan as a person reads it, and as a machine does.

use std::fmt;

use serde_json::{Value, json};

use super::{Advice, Place, Plan, Subject};
use crate::train::memory::CONTEXT_BYTES;

/// Bytes as people read them.
pub(crate) fn gb(num_bytes: u64) -> String {
    match num_bytes {
        0..1_000_000_000 => format!("{:.1} MB", num_bytes as f64 / 1e6),
        _ => format!("{:.2} GB", num_bytes as f64 / 1e9),
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpu(gpu) => write!(
                f,
                "{} with {} ({} of them for the driver)",
                gpu.name,
                gb(gpu.num_bytes),
                gb(CONTEXT_BYTES)
            ),
            Self::Cpu(num_bytes) => write!(f, "the CPU of this machine, with {}", gb(*num_bytes)),
        }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.settings.is_empty() {
            writeln!(f, "no setting that was tried makes it fit")?;
        } else {
            let sets: Vec<String> = self
                .settings
                .iter()
                .map(|set| format!("--set {set}"))
                .collect();
            writeln!(
                f,
                "it fits with {} ({})",
                sets.join(" "),
                gb(self.num_bytes)
            )?;
        }
        match self.gpu {
            Some(gpu) => writeln!(f, "as it is it fits a {}", gpu.name),
            None => writeln!(f, "as it is it fits none of the GPUs above"),
        }
    }
}

impl Plan {
    /// The plan of `subject` as text.
    pub fn text(&self, subject: &Subject) -> String {
        let (model, config) = (&subject.model, &subject.config);
        let mut text = String::new();
        let mut line = |name: &str, what: String| text.push_str(&format!("{name:<26}{what}\n"));
        line(
            "model",
            format!(
                "{}, {} layers, hidden size {}",
                model.model_type,
                model.layers.len(),
                model.hidden_size
            ),
        );
        line("on", self.place.to_string());
        let source = match subject.lengths {
            Some(_) => "as long as the data make it",
            None => "`micro_batch_size` times `sequence_len`, as the data are not there",
        };
        line(
            "longest pass",
            format!("{} tokens, {source}", self.memory.capacity),
        );
        let recompute = if self.memory.recompute {
            "recomputed in backward"
        } else {
            "kept"
        };
        line("activations are", recompute.to_owned());
        line("adapter parameters", self.num_parameters.to_string());
        line("", String::new());
        for group in &self.groups {
            line(group.name, format!("{:>12}", gb(group.num_bytes)));
        }
        let (total, usable) = (self.memory.num_bytes(), self.place.usable_bytes());
        line("in all", format!("{:>12}", gb(total)));
        let verdict = match &self.refused {
            Some(reason) => format!("does not run there: {reason}"),
            None if self.fits() => format!("fits, {} are left", gb(usable - total)),
            None => format!("does not fit, {} are missing", gb(total - usable)),
        };
        line("", verdict);
        line("", String::new());
        line("largest", String::new());
        for (name, bytes) in self.largest() {
            line(&format!("  {:>12}", gb(*bytes as u64)), name.clone());
        }
        line("", String::new());
        let largest = match self.largest_capacity {
            0 => "none, not even of 256 tokens".to_owned(),
            tokens => format!(
                "{tokens} tokens, or micro_batch_size {} of {} tokens",
                tokens / config.sequence_len,
                config.sequence_len
            ),
        };
        line("longest pass that fits", largest);
        let host = self.host;
        line(
            "disk",
            format!(
                "{} for {} checkpoints of {}, {} for the adapter",
                gb(host.num_checkpoints * host.checkpoint_bytes),
                host.num_checkpoints,
                gb(host.checkpoint_bytes),
                gb(host.adapter_bytes)
            ),
        );
        line("host memory", format!("{} at most", gb(host.memory_bytes)));
        line(
            "arithmetic",
            format!(
                "{:.3} PFLOP in an optimizer step",
                self.step_flops as f64 / 1e15
            ),
        );
        text.push_str(&self.predicted());
        text
    }

    fn predicted(&self) -> String {
        let mut text = format!(
            "\npredicted, not measured\n{:<18}{:>12}{:>8}{:>12}{:>12}\n",
            "GPU", "takes", "fits", "s a step", "tokens/s"
        );
        for on in &self.predictions {
            let name = on.gpu.name;
            text.push_str(&match on.prediction {
                None => format!("{name:<18}{:>12}{:>8}\n", "its kernels", "no"),
                Some(prediction) => format!(
                    "{name:<18}{:>12}{:>8}{:>12.2}{:>12.0}\n",
                    gb(prediction.num_bytes),
                    if prediction.fits { "yes" } else { "no" },
                    prediction.step_s,
                    prediction.tokens_per_s
                ),
            });
        }
        text
    }

    /// The plan as JSON; bytes and FLOPs are whole numbers, times seconds.
    pub fn json(&self, advice: Option<&Advice>) -> Value {
        let groups = self
            .groups
            .iter()
            .map(|group| (group.name.to_owned(), json!(group.num_bytes)));
        let predictions = self.predictions.iter().map(|on| {
            json!({
                "gpu": on.gpu.name,
                "fits": on.fits(),
                "num_bytes": on.prediction.map(|prediction| prediction.num_bytes),
                "predicted_step_s": on.prediction.map(|prediction| prediction.step_s),
                "predicted_tokens_per_s": on.prediction.map(|prediction| prediction.tokens_per_s),
            })
        });
        json!({
            "on": self.place.to_string(),
            "fits": self.fits(),
            "refused": self.refused,
            "num_bytes": self.memory.num_bytes(),
            "usable_bytes": self.place.usable_bytes(),
            "capacity_tokens": self.memory.capacity,
            "largest_capacity_tokens": self.largest_capacity,
            "recompute": self.memory.recompute,
            "num_parameters": self.num_parameters,
            "groups": Value::Object(groups.collect()),
            "largest": self.largest().into_iter().map(|(name, bytes)| json!({"name": name, "num_bytes": bytes})).collect::<Vec<_>>(),
            "step_flops": self.step_flops,
            "checkpoint_bytes": self.host.checkpoint_bytes,
            "num_checkpoints": self.host.num_checkpoints,
            "adapter_bytes": self.host.adapter_bytes,
            "host_memory_bytes": self.host.memory_bytes,
            "predictions": predictions.collect::<Vec<_>>(),
            "advice": advice.map(|advice| json!({
                "settings": advice.settings,
                "num_bytes": advice.num_bytes,
                "gpu": advice.gpu.map(|gpu| gpu.name),
            })),
        })
    }
}

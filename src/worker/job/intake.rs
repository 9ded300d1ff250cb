//! What a job's input gives, under one name for each thing however it is spelt.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value};

use crate::config::{number, setting_name, shown};

/// Settings that `hyperparameters` may hold. Any other setting goes into `config`.
const HYPERPARAMETERS: [&str; 21] = [
    "base_model",
    "batch_size",
    "learning_rate",
    "num_epochs",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "moe_lora",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler",
    "optimizer",
    "sequence_len",
    "seed",
    "train_on_inputs",
    "fold_conversations",
    "val_set_size",
    "adapter_dtype",
];

/// Settings that are not a job's to make, and why.
const NOT_A_JOBS: [(&str, &str); 8] = [
    ("base_model", "give `hyperparameters.base_model`"),
    ("base_model_id", "give `hyperparameters.base_model`"),
    ("datasets", "give `dataset_url`"),
    ("output_dir", "the worker chooses it"),
    ("device", "the worker chooses it"),
    ("init_adapter", "a path on the worker cannot be given"),
    (
        "gradient_accumulation_steps",
        "it follows from `hyperparameters.batch_size`, the targets of an optimizer step",
    ),
    (
        "save_total_limit",
        "it is 2: the newest checkpoint and the one before it",
    ),
];

/// A key that means nothing here.
#[derive(Clone, PartialEq)]
pub struct Unknown {
    /// Where it stands, such as `hyperparameters.warmup`.
    pub path: String,
    /// What it holds. Not shown: it may be a secret.
    pub value: Value,
    /// The key that may have been meant, or where it belongs.
    pub hint: Option<String>,
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` means nothing here", self.path)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A value and where it stood.
#[derive(Debug)]
struct Given {
    path: String,
    value: Value,
}

/// A job's input as it is read: values by name, and every problem.
#[derive(Debug, Default)]
pub(super) struct Intake {
    given: BTreeMap<String, Given>,
    pub(super) unknown: Vec<Unknown>,
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Intake {
    /// Takes apart the whole input.
    pub(super) fn new(input: &Value) -> Self {
        let mut intake = Self::default();
        let Some(input) = input.as_object() else {
            let reason = format!("the input is {}, expected an object", kind(input));
            intake.problems.push(reason);
            return intake;
        };
        for (key, value) in input {
            match key.as_str() {
                "callback_url" if value.as_str() == Some("") => {}
                "job_id" | "dataset_url" | "callback_url" => intake.put(key, key, value),
                "hyperparameters" => intake.each(key, value, Self::hyperparameter),
                "gpu_config" => intake.each(key, value, Self::gpu),
                "config" | "overrides" => intake.each(key, value, Self::setting),
                _ => {
                    let belongs = hyperparameter_name(key)
                        .map(|_| "it belongs into `hyperparameters`, where it would be read");
                    intake.leave("", key, value, belongs);
                }
            }
        }
        intake
    }

    fn each(&mut self, object: &str, value: &Value, take: fn(&mut Self, &str, &str, &Value)) {
        match value {
            Value::Object(entries) => {
                for (key, value) in entries {
                    take(self, object, key, value);
                }
            }
            Value::Null => {}
            Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                let reason = format!("`{object}` is {}, expected an object", kind(value));
                self.problems.push(reason);
            }
        }
    }

    fn hyperparameter(&mut self, object: &str, key: &str, value: &Value) {
        if let Some(name) = hyperparameter_name(key) {
            self.put(name, &format!("{object}.{key}"), value);
        } else {
            let is_near = |name: &&str| strsim::damerau_levenshtein(key, name) <= 2;
            let near = HYPERPARAMETERS.into_iter().find(is_near);
            let hint = near.map(|name| format!("did you mean `{name}`?"));
            self.leave(object, key, value, hint.as_deref());
        }
    }

    fn gpu(&mut self, object: &str, key: &str, value: &Value) {
        let name = match key {
            "type" | "gpu_type" => "gpu_type",
            "count" | "num_gpus" | "gpu_count" => "gpu_count",
            "gpu_memory_gb" | "memory_gb" => "gpu_memory_gb",
            "cost_per_gpu_hour" => "cost_per_gpu_hour",
            _ => return self.leave(object, key, value, None),
        };
        self.put(name, &format!("{object}.{key}"), value);
    }

    fn setting(&mut self, object: &str, key: &str, value: &Value) {
        let path = format!("{object}.{}", shown_key(key));
        let name = setting_name(key);
        if let Some((_, why)) = NOT_A_JOBS.iter().find(|(known, _)| *known == name) {
            self.problems
                .push(format!("`{path}` is not a job's to set; {why}"));
            return;
        }
        // Files of the worker are no input of a job.
        let is_path = match name {
            "chat_template" => value.as_str().is_some_and(|text| text != "chatml"),
            "resume_from_checkpoint" => value
                .as_str()
                .is_some_and(|text| !matches!(text, "auto" | "none")),
            _ => false,
        };
        if is_path {
            let expected = match name {
                "chat_template" => "`chatml`, or nothing for the model's own",
                _ => "`auto` or `none`",
            };
            let reason = format!(
                "`{path}` is {}, a path on the worker, which cannot be given; expected {expected}",
                shown(value)
            );
            self.problems.push(reason);
            return;
        }
        // A key that is none is told by the config's reader.
        self.put(&shown_key(name), &path, value);
    }

    fn leave(&mut self, object: &str, key: &str, value: &Value, hint: Option<&str>) {
        let key = shown_key(key);
        let path = match object {
            "" => key,
            _ => format!("{object}.{key}"),
        };
        self.unknown.push(Unknown {
            path,
            value: value.clone(),
            hint: hint.map(str::to_owned),
        });
    }

    /// Keeps a value; `null` counts as absent, and another value under another spelling is a problem.
    fn put(&mut self, name: &str, path: &str, value: &Value) {
        if value.is_null() {
            return;
        }
        if let Some(other) = self.given.get(name) {
            if !is_same(&other.value, value) {
                let reason = format!(
                    "`{}` is {} and `{path}` is {}; they mean the same, keep one",
                    other.path,
                    shown(&other.value),
                    shown(value)
                );
                self.problems.push(reason);
            }
            return;
        }
        let given = Given {
            path: path.to_owned(),
            value: value.clone(),
        };
        self.given.insert(name.to_owned(), given);
    }

    /// Where `name` stood, if it was given.
    pub(super) fn path(&self, name: &str) -> Option<&str> {
        self.given.get(name).map(|given| given.path.as_str())
    }

    /// Takes `name` out.
    pub(super) fn take(&mut self, name: &str) -> Option<(String, Value)> {
        let given = self.given.remove(name)?;
        Some((given.path, given.value))
    }

    /// Text, taken out.
    pub(super) fn text(&mut self, name: &str) -> Option<(String, String)> {
        let (path, value) = self.take(name)?;
        match value.as_str().filter(|text| !text.trim().is_empty()) {
            Some(text) => Some((path, text.to_owned())),
            None if value.is_string() => {
                self.problems
                    .push(format!("`{path}` is empty, expected a text"));
                None
            }
            None => {
                let kind = kind(&value);
                self.problems
                    .push(format!("`{path}` is {kind}, expected a text"));
                None
            }
        }
    }

    /// A number for which `accept` holds; another one is a problem, and taken out.
    pub(super) fn number(
        &mut self,
        name: &str,
        expected: &str,
        accept: impl FnOnce(f64) -> bool,
    ) -> Option<f64> {
        let given = self.given.get(name)?;
        let found = number(&given.value).filter(|value| value.is_finite() && accept(*value));
        if found.is_none() {
            let (path, value) = (&given.path, shown(&given.value));
            let reason = format!("`{path}` is {value}, expected {expected}");
            self.problems.push(reason);
            self.given.remove(name);
        }
        found
    }

    /// A whole number in `min..=max`.
    pub(super) fn count(&mut self, name: &str, min: usize, max: usize) -> Option<usize> {
        let expected = format!("a whole number from {min} to {max}");
        let found = self.number(name, &expected, |value| {
            value.fract() == 0.0 && value >= min as f64 && value <= max as f64
        })?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole and between the bounds"
        )]
        Some(found as usize)
    }

    /// What is left: settings of a run, by their key.
    pub(super) fn settings(&self) -> Map<String, Value> {
        let pairs = self.given.iter();
        pairs
            .map(|(name, given)| (name.clone(), given.value.clone()))
            .collect()
    }
}

/// The name of what `key` means among the hyperparameters.
fn hyperparameter_name(key: &str) -> Option<&'static str> {
    let name = match key {
        "rank" => "lora_r",
        "alpha" => "lora_alpha",
        "dropout" => "lora_dropout",
        other => setting_name(other),
    };
    HYPERPARAMETERS.into_iter().find(|known| *known == name)
}

/// Equal, or equal numbers in other writing.
fn is_same(a: &Value, b: &Value) -> bool {
    let same_number = || Some(number(a)?.total_cmp(&number(b)?).is_eq());
    a == b || same_number().unwrap_or(false)
}

/// What kind of value it is, without its content.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A key as it can stand in a message: no control characters, not endless.
fn shown_key(key: &str) -> String {
    let short: String = key.chars().take(60).collect();
    short.escape_debug().to_string()
}

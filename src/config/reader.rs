//! Typed reading of a flat YAML mapping. Every key asked for becomes a known key; every problem is kept, so that a user
//! sees all of them at once.

use std::path::PathBuf;

use serde_json::{Map, Value};

/// Other spellings in use, and the key they mean.
const ALIASES: &[(&str, &str)] = &[
    ("model_name_or_path", "base_model"),
    ("adapter_name_or_path", "init_adapter"),
    ("lora_rank", "lora_r"),
    ("lora_target", "lora_target_modules"),
    ("target_modules", "lora_target_modules"),
    ("per_device_train_batch_size", "micro_batch_size"),
    ("num_train_epochs", "num_epochs"),
    ("epochs", "num_epochs"),
    ("lr", "learning_rate"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("optim", "optimizer"),
    ("max_seq_length", "sequence_len"),
    ("cutoff_len", "sequence_len"),
    ("packing", "sample_packing"),
    ("val_size", "val_set_size"),
    ("max_norm", "max_grad_norm"),
];

/// The key that `key` means: itself, unless it is another spelling.
pub fn setting_name(key: &str) -> &str {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == key);
    alias.map_or(key, |(_, name)| name)
}

/// A mapping being read.
#[derive(Debug)]
pub(super) struct Reader {
    entries: Map<String, Value>,
    known: Vec<&'static str>,
    problems: Vec<String>,
}

impl Reader {
    /// Reads `entries`, after giving aliases their key.
    pub(super) fn new(entries: Map<String, Value>) -> Self {
        let mut reader = Self {
            entries: Map::new(),
            known: Vec::new(),
            problems: Vec::new(),
        };
        for (key, value) in entries {
            let name = setting_name(&key);
            if reader.entries.contains_key(name) {
                reader.problem(format!(
                    "`{name}` is given twice (also as `{key}`); keep one"
                ));
            }
            reader.entries.insert(name.to_owned(), value);
        }
        reader
    }

    /// Keeps a problem.
    pub(super) fn problem(&mut self, reason: String) {
        self.problems.push(reason);
    }

    /// The value of `key`, `null` read as absent.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.entries.remove(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.take(key)?;
        let parsed = parse(&value);
        if parsed.is_none() {
            self.problem(format!("`{key}` is {}, expected {expected}", shown(&value)));
        }
        parsed
    }

    /// Text.
    pub(super) fn text(&mut self, key: &'static str) -> Option<String> {
        self.read(key, "a text", |value| {
            let text = value.as_str().filter(|text| !text.trim().is_empty());
            text.map(str::to_owned)
        })
    }

    /// A path.
    pub(super) fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }

    /// `true` or `false`.
    pub(super) fn switch(&mut self, key: &'static str, default: bool) -> bool {
        self.read(key, "true or false", Value::as_bool)
            .unwrap_or(default)
    }

    /// A whole number, at least `min`.
    pub(super) fn count(&mut self, key: &'static str, min: usize) -> Option<usize> {
        let expected = format!("a whole number of at least {min}");
        self.read(key, &expected, |value| {
            let whole = number(value).filter(|value| value.fract() == 0.0)?;
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "whole and in range"
            )]
            let whole = (0.0..9e15).contains(&whole).then_some(whole as usize)?;
            (whole >= min).then_some(whole)
        })
    }

    /// A number for which `accept` holds; `expected` says which those are.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        expected: &str,
        accept: impl FnOnce(f64) -> bool,
    ) -> Option<f64> {
        self.read(key, expected, |value| {
            number(value).filter(|value| value.is_finite() && accept(*value))
        })
    }

    /// One of `names`, by its index.
    pub(super) fn choice(&mut self, key: &'static str, names: &[&str]) -> Option<usize> {
        let expected = format!("one of {}", names.join(", "));
        self.read(key, &expected, |value| {
            let text = value.as_str()?;
            names.iter().position(|name| *name == text)
        })
    }

    /// A list of texts; one text, with commas or not, will do.
    pub(super) fn list(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.read(key, "a list of names", |value| {
            if let Some(text) = value.as_str() {
                let parts = text.split(',');
                return Some(parts.map(|part| part.trim().to_owned()).collect());
            }
            let names = value.as_array()?.iter().map(Value::as_str);
            names.map(|name| name.map(str::to_owned)).collect()
        })
        .map(|mut names: Vec<String>| {
            if names.is_empty() || names.iter().any(String::is_empty) {
                self.problem(format!(
                    "`{key}` has an empty name, or none; name at least one module"
                ));
            }
            let mut seen = Vec::new();
            names.retain(|name| {
                let first = !seen.contains(name);
                seen.push(name.clone());
                first
            });
            names
        })
    }

    /// All problems, unknown keys first; `None` where all is well.
    pub(super) fn finish(self) -> Option<String> {
        let unknown = self.entries.keys().map(|key| match self.nearest(key) {
            Some(near) => format!("unknown key `{key}`; did you mean `{near}`?"),
            None => format!("unknown key `{key}`; the README lists the keys"),
        });
        let mut problems: Vec<String> = unknown.collect();
        problems.extend(self.problems);
        (!problems.is_empty()).then(|| problems.join("\n  "))
    }

    fn nearest(&self, key: &str) -> Option<&'static str> {
        let own = self.known.iter().map(|name| (*name, *name));
        let all = own.chain(ALIASES.iter().copied());
        let near = all.map(|(spelling, name)| (strsim::damerau_levenshtein(key, spelling), name));
        let best = near.min_by_key(|(distance, _)| *distance);
        best.filter(|(distance, _)| *distance <= 1 + key.len() / 3)
            .map(|(_, name)| name)
    }
}

/// A number, also one that YAML took for text (`1e-4`).
pub(crate) fn number(value: &Value) -> Option<f64> {
    let written = || value.as_str()?.trim().parse().ok();
    value.as_f64().or_else(written)
}

/// A value as it stands in a message.
pub(crate) fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    if text.chars().count() > 60 {
        text = text.chars().take(60).collect::<String>() + "...";
    }
    format!("`{}`", text.trim_matches('"'))
}

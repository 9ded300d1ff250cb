//! Typed look-ups in a foreign JSON object, with errors that name the key.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object of `config.json`; an explicit `null` counts as absent unless said otherwise.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a> {
    map: &'a Map<String, Value>,
    origin: &'a Path,
}

impl<'a> Raw<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, origin: &'a Path) -> Self {
        Self { map, origin }
    }

    /// Whether the key is written at all, be it as `null`.
    pub(super) fn has(self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn get(self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn object(self, key: &str) -> Result<Option<Self>> {
        self.typed(key, "an object", |value| {
            value.as_object().map(|map| Self::new(map, self.origin))
        })
    }

    pub(super) fn array(self, key: &str) -> Result<Option<&'a [Value]>> {
        self.typed(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    pub(super) fn string(self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(super) fn bool(self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A finite number.
    pub(super) fn number(self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| {
            value.as_f64().filter(|number| number.is_finite())
        })
    }

    /// A finite number above zero.
    pub(super) fn positive(self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| {
            value.as_f64().filter(|n| n.is_finite() && *n > 0.0)
        })
    }

    /// An integer in `min..=max`.
    pub(super) fn integer(self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        self.typed(key, &format!("an integer from {min} to {max}"), |value| {
            usize::try_from(value.as_u64()?)
                .ok()
                .filter(|n| (min..=max).contains(n))
        })
    }

    /// An integer in `1..=max` that must be there.
    pub(super) fn count(self, key: &str, max: usize) -> Result<usize> {
        self.require(key, self.integer(key, 1, max)?)
    }

    pub(super) fn require<T>(self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(format!("`{key}` is missing")))
    }

    pub(super) fn error(self, reason: impl Into<String>) -> Error {
        Error::format(self.origin, reason)
    }

    fn typed<T>(
        self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| self.error(format!("`{key}` is {value}, expected {expected}")))
    }
}

/// Refuses `key: value`, a feature the field has and this engine has not.
pub(super) fn unsupported(key: &str, value: impl std::fmt::Display, why: &str) -> Error {
    Error::Unsupported {
        what: format!("`{key}: {value}`"),
        why: why.to_owned(),
    }
}

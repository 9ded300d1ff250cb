//! A value that no formatter prints.

use std::fmt;
use std::sync::Arc;

/// A key, token or password. It is printed by no formatter; [`Secret::expose`] is the one way to its text.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// Wraps `value`; white space around it (a trailing newline of a mounted file) is dropped.
    pub fn new(value: &str) -> Self {
        Self(Arc::from(value.trim()))
    }

    /// The secret itself, for the request that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret([redacted])")
    }
}

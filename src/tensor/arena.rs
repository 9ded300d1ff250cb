//! The arena: every buffer of a run is asked for here, once, before the first step.
//!
//! The same `alloc` functions run against a planning arena (counts bytes, allocates nothing) and a real one, so the
//! ledger a plan prints is the memory a run takes.

use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// One buffer of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name of the tensor.
    pub name: String,
    /// Extents.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Size.
    pub num_bytes: usize,
}

/// Hands out tensors and keeps the ledger.
#[derive(Debug)]
pub struct Arena {
    planning: bool,
    prefix: Vec<String>,
    ledger: Vec<Entry>,
}

impl Arena {
    /// Counts only.
    pub fn plan() -> Self {
        Self {
            planning: true,
            prefix: Vec::new(),
            ledger: Vec::new(),
        }
    }

    /// Allocates in host memory.
    pub fn host() -> Self {
        Self {
            planning: false,
            prefix: Vec::new(),
            ledger: Vec::new(),
        }
    }

    /// A zeroed tensor named `prefix.name`.
    ///
    /// # Errors
    /// None on the host; device arenas report what does not fit.
    pub fn alloc(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut full_name = self.prefix.join(".");
        if !full_name.is_empty() {
            full_name.push('.');
        }
        full_name.push_str(name);
        let tensor = if self.planning {
            Tensor::planned(&full_name, shape, dtype)
        } else {
            Tensor::zeros(&full_name, shape, dtype)
        };
        self.ledger.push(Entry {
            name: full_name,
            shape: shape.to_vec(),
            dtype,
            num_bytes: tensor.num_bytes(),
        });
        Ok(tensor)
    }

    /// Runs `f` with `name` put before the names it allocates.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn scope<T>(
        &mut self,
        name: impl Into<String>,
        f: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.prefix.push(name.into());
        let result = f(self);
        self.prefix.pop();
        result
    }

    /// All buffers, in the order they were asked for.
    pub fn ledger(&self) -> &[Entry] {
        &self.ledger
    }

    /// Bytes of all buffers.
    pub fn num_bytes(&self) -> usize {
        self.ledger.iter().map(|entry| entry.num_bytes).sum()
    }
}

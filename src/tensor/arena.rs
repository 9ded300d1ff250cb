//! The arena: every buffer of a run is asked for here, once, before the first step.
//!
//! The same `alloc` functions run against a planning arena (counts bytes, allocates nothing) and a real one, so the
//! ledger a plan prints is the memory a run takes.

use std::fmt;

use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Allocates a tensor on some device.
pub type Allocate = dyn Fn(&str, &[usize], DType) -> Result<Tensor>;

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
pub struct Arena {
    /// `None`: counts only.
    allocate: Option<Box<Allocate>>,
    prefix: Vec<String>,
    ledger: Vec<Entry>,
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("is_plan", &self.allocate.is_none())
            .field("ledger", &self.ledger)
            .finish_non_exhaustive()
    }
}

impl Arena {
    /// Counts only.
    pub fn plan() -> Self {
        Self {
            allocate: None,
            prefix: Vec::new(),
            ledger: Vec::new(),
        }
    }

    /// Allocates with `allocate`.
    pub fn new(allocate: Box<Allocate>) -> Self {
        Self {
            allocate: Some(allocate),
            ..Self::plan()
        }
    }

    /// Allocates in host memory.
    pub fn host() -> Self {
        Self::new(Box::new(|name, shape, dtype| {
            Ok(Tensor::zeros(name, shape, dtype))
        }))
    }

    /// A tensor named `prefix.name`; zeros on the host, what the device has there otherwise.
    ///
    /// # Errors
    /// None on the host; devices report what does not fit.
    pub fn alloc(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let mut full_name = self.prefix.join(".");
        if !full_name.is_empty() {
            full_name.push('.');
        }
        full_name.push_str(name);
        let tensor = match &self.allocate {
            None => Tensor::planned(&full_name, shape, dtype),
            Some(allocate) => allocate(&full_name, shape, dtype)?,
        };
        self.ledger.push(Entry {
            name: full_name,
            shape: shape.to_vec(),
            dtype,
            num_bytes: tensor.num_bytes(),
        });
        Ok(tensor)
    }

    /// Enters memory that something else allocated.
    pub fn count(&mut self, name: &str, num_bytes: usize) {
        if num_bytes > 0 {
            self.ledger.push(Entry {
                name: name.to_owned(),
                shape: vec![num_bytes],
                dtype: DType::U8,
                num_bytes,
            });
        }
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

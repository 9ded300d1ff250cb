//! The one list of operations.

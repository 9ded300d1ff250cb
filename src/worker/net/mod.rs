//! Requests to hosts that a job names: guarded, bounded, resumable.
//!
//! [`guard`] decides where a request may go, [`fetch`] brings a file home, [`gzip`] unpacks it within bounds.

pub mod address;
pub mod backoff;
pub mod cancel;
pub mod error;
pub mod fetch;
pub mod files;
pub mod guard;
pub mod gzip;
mod part;
pub mod time;

pub use cancel::{Cancel, Canceller};
pub use error::{Error, Kind};
pub use guard::{Guard, Policy};

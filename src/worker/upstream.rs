//! Who gave the job: the platform's queue, or this machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

use super::platform::{Platform, Posted};

/// Who gave a job and takes its result. Clones are the same.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// RunPod's queue.
    Runpod(Platform),
    /// A job given on this machine.
    Local(Board),
}

/// Where jobs given on this machine tell how they are, by id. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<String, [Option<Value>; 2]>>>);

impl Board {
    /// What job `id` told last.
    pub fn progress(&self, id: &str) -> Option<Value> {
        self.get(id, 0)
    }

    /// What job `id` answered.
    pub fn answer(&self, id: &str) -> Option<Value> {
        self.get(id, 1)
    }

    fn get(&self, id: &str, which: usize) -> Option<Value> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(id)?[which].clone()
    }

    fn set(&self, id: &str, which: usize, value: &Value) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(id.to_owned()).or_default()[which] = Some(value.clone());
    }
}

impl Upstream {
    /// Tells how far job `id` is, once.
    ///
    /// # Errors
    /// Why it did not arrive.
    pub async fn progress(&self, id: &str, output: &Value) -> Result<(), String> {
        match self {
            Self::Runpod(platform) => platform.progress(id, output).await,
            Self::Local(board) => {
                board.set(id, 0, output);
                Ok(())
            }
        }
    }

    /// Delivers the result of job `id`.
    pub async fn result(&self, id: &str, body: &Value, patience: Duration) -> Posted {
        match self {
            Self::Runpod(platform) => platform.result(id, body, patience).await,
            Self::Local(board) => {
                board.set(id, 1, body);
                Posted::Accepted
            }
        }
    }
}

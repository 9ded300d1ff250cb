//! A flag that ends what is under way.

use tokio::sync::watch;

use super::error::{Error, Kind, Result};

/// Raises the flag of its [`Cancel`]s.
#[derive(Debug, Clone)]
pub struct Canceller(watch::Sender<bool>);

/// Tells whether to stop. Clones share one flag.
#[derive(Debug, Clone)]
pub struct Cancel(watch::Receiver<bool>);

impl Canceller {
    /// A flag that is down, and its reader.
    pub fn new() -> (Self, Cancel) {
        let (sender, receiver) = watch::channel(false);
        (Self(sender), Cancel(receiver))
    }

    /// Raises the flag, for good.
    pub fn cancel(&self) {
        self.0.send_replace(true);
    }

    /// Whether it was raised.
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }
}

impl Cancel {
    /// A flag that nobody raises.
    pub fn never() -> Self {
        Canceller::new().1
    }

    /// Whether the flag is up.
    pub fn is_cancelled(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once the flag is up; never, if its [`Canceller`] is gone.
    pub async fn cancelled(&self) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|up| *up).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// `work`'s result, unless the flag goes up first: then `work` is dropped where it stands.
    ///
    /// # Errors
    /// [`Kind::Cancelled`].
    pub async fn or<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(Error::new(Kind::Cancelled, "cancelled")),
            done = work => Ok(done),
        }
    }
}

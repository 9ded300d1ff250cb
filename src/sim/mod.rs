//! A simulator of what the training worker talks to: the serverless platform (client and worker side), Supabase's rows
//! and object storage, a file server, a model hub, and a callback receiver. Everything on one port of 127.0.0.1.
//!
//! It is for rehearsals and tests: state is in memory, objects are in a folder, faults are scripted, every request is
//! kept, and rules a real platform would not enforce are watched ([`Sim::violations`]). It knows nothing of the worker. Start reading at [`Sim::start`] and `server.rs`.
//!
//! | path | part |
//! |---|---|
//! | `/v2/{endpoint}/...` | platform |
//! | `/rest/v1/{table}` | rows |
//! | `/storage/v1/...` | object storage |
//! | `/files/{name}` | files |
//! | `/hub/...`, `/hub-files/...` | model hub |
//! | `/callback/{name}` | callbacks |

mod api;
mod callback;
mod clock;
mod content;
pub mod fault;
mod files;
mod hub;
mod platform;
mod record;
mod rows;
mod server;
mod settings;
mod storage;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::http::client_builder;

pub use callback::Callback;
pub use fault::{Action, Fault, Route};
pub use platform::{Delivery, Status, Violation, ViolationKind};
pub use record::Record;
pub use rows::RowEvent;
pub use settings::{Bucket, Settings};
pub use storage::Object;

/// Everything that changes.
struct State {
    platform: platform::jobs::Platform,
    rows: rows::Rows,
    storage: storage::Storage,
    callbacks: callback::Callbacks,
    /// Models by id.
    hub: BTreeMap<String, hub::Repository>,
    faults: fault::Faults,
    records: Vec<Record>,
}

/// What the handlers and the owner share.
struct Shared {
    settings: Settings,
    base: String,
    started: Instant,
    files_dir: PathBuf,
    data_dir: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
    wake: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes everyone who waits for a change.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        self.wake.notify_waiters();
        result
    }

    /// Tries now and after every change until `deadline`.
    async fn poll<T>(
        &self,
        deadline: Instant,
        mut attempt: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        loop {
            let woken = self.wake.notified();
            let result = attempt(&mut self.lock());
            if result.is_some() {
                self.change(|_| ());
                return result;
            }
            tokio::time::timeout_at(deadline.into(), woken).await.ok()?;
        }
    }
}

/// A running simulator; dropping it stops it and removes its temporary folders.
pub struct Sim {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _folders: Vec<tempfile::TempDir>,
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sim")
            .field("base", &self.shared.base)
            .finish_non_exhaustive()
    }
}

impl Sim {
    /// Starts a simulator on a thread of its own.
    ///
    /// # Errors
    /// The port is taken, a folder cannot be made, or the thread cannot be started.
    pub fn start(settings: Settings) -> io::Result<Self> {
        let mut folders = Vec::new();
        let mut folder = |wanted: Option<&PathBuf>| match wanted {
            Some(path) => fs_err::create_dir_all(path).map(|()| path.clone()),
            None => tempfile::tempdir().map(|folder| {
                let path = folder.path().to_owned();
                folders.push(folder);
                path
            }),
        };
        let files_dir = folder(settings.files_dir.as_ref())?;
        let data_dir = folder(settings.data_dir.as_ref())?;
        let listener =
            std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, settings.port)))?;
        listener.set_nonblocking(true)?;
        let started = Instant::now();
        let mut faults = fault::Faults::default();
        settings
            .faults
            .iter()
            .cloned()
            .for_each(|fault| faults.add(fault));
        let shared = Arc::new(Shared {
            base: format!("http://{}", listener.local_addr()?),
            started,
            files_dir,
            data_dir,
            state: Mutex::new(State {
                platform: platform::jobs::Platform::new(&settings, started),
                rows: rows::Rows::new(started),
                storage: storage::Storage::default(),
                callbacks: callback::Callbacks::default(),
                hub: BTreeMap::new(),
                faults,
                records: Vec::new(),
            }),
            changed: Condvar::new(),
            wake: Notify::new(),
            settings,
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let inside = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("sim".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = serve(inside, listener) => {}
                        _ = stopped => {}
                    }
                });
                // Connections that hang on purpose must not hold up the end.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            shared,
            stop: Some(stop),
            thread: Some(thread),
            _folders: folders,
        })
    }

    /// Waits until `holds` is true of this simulator, which is asked after every change; false if it never was.
    pub fn wait_until(&self, holds: impl Fn(&Self) -> bool, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            if holds(self) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            // The pause bounds how late a change is seen that fell between the question and this wait.
            let pause = left.min(Duration::from_millis(20));
            drop(self.shared.changed.wait_timeout(self.shared.lock(), pause));
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A handler that panicked has been reported by the runtime already.
            drop(thread.join());
        }
    }
}

/// Serves requests and lets the platform's time pass, until dropped.
async fn serve(shared: Arc<Shared>, listener: std::net::TcpListener) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let app = axum::Router::new()
        .fallback(server::handle)
        .with_state(Arc::clone(&shared))
        .into_make_service_with_connect_info::<wire::Cut>();
    let ticks = async {
        let mut interval = tokio::time::interval(Duration::from_millis(20));
        loop {
            interval.tick().await;
            let (changed, notices) = {
                let mut state = shared.lock();
                let changed = state.platform.tick(Instant::now());
                (changed, std::mem::take(&mut state.platform.outbox))
            };
            if changed {
                shared.change(|_| ());
            }
            for notice in notices {
                tokio::spawn(deliver(notice, shared.settings.webhook_retry_wait));
            }
        }
    };
    tokio::select! {
        _ = axum::serve(wire::Wires(listener), app) => {}
        () = ticks => {}
    }
}

/// Posts a job's final document to its webhook, up to three times.
async fn deliver(notice: platform::jobs::Notice, wait: Duration) {
    let Ok(client) = client_builder().timeout(Duration::from_secs(10)).build() else {
        return;
    };
    for attempt in 0..3 {
        if attempt > 0 {
            tokio::time::sleep(wait).await;
        }
        let sent = client.post(&notice.url).json(&notice.document).send().await;
        if sent.is_ok_and(|response| response.status() == 200) {
            return;
        }
    }
}

//! What every job of a worker shares.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::callback::{Callback, CallbackError};
use super::later::Later;
use super::lease::Holder;
use super::log::Log;
use super::model::{Roots, VOLUMES};
use super::net::{Guard, Policy};
use super::state::{JobDir, State};
use super::supabase::Supabase;
use crate::config::{Env, WorkerEnv};

/// Where state goes on a volume.
const STATE_FOLDER: &str = "brightrun";

/// A worker, but for its queue.
#[derive(Debug)]
pub struct Context {
    /// What the operator set.
    pub env: WorkerEnv,
    /// What the engine is told.
    pub engine: Env,
    /// The application's project, where there is one.
    pub supabase: Option<Supabase>,
    /// Sends requests to addresses that jobs name.
    pub guard: Guard,
    /// What outlives the worker.
    pub state: State,
    /// Who holds jobs.
    pub holder: Holder,
    /// When what could not be delivered is tried again.
    pub later: Later,
    /// This binary.
    pub exe: PathBuf,
    /// The worker's log.
    pub log: Log,
}

impl Context {
    /// Opens everything that `env` names. `scratch` is used where there is no volume.
    ///
    /// # Errors
    /// For a person: a setting that cannot be used, a state directory that cannot be made.
    pub fn new(
        env: WorkerEnv,
        engine: Env,
        worker_id: &str,
        exe: PathBuf,
        scratch: PathBuf,
        log: Log,
    ) -> Result<Self, String> {
        if !env.problems.is_empty() {
            return Err(env.problems.join("; "));
        }
        let supabase = match (&env.supabase_url, env.supabase_key.is_empty()) {
            (Some(url), false) => {
                let project = Supabase::new(url, env.supabase_key.clone());
                let project = project.map_err(|error| format!("SUPABASE_URL: {error}"))?;
                Some(match &env.storage_url {
                    None => project,
                    Some(url) => project
                        .with_storage_url(url)
                        .map_err(|error| format!("SUPABASE_STORAGE_URL: {error}"))?,
                })
            }
            (None, true) => {
                log.warn("SUPABASE_URL is not set: adapters stay on this machine");
                None
            }
            (Some(_), true) => {
                return Err("SUPABASE_URL is set and SUPABASE_SERVICE_ROLE_KEY is not".to_owned());
            }
            (None, false) => {
                return Err("SUPABASE_SERVICE_ROLE_KEY is set and SUPABASE_URL is not".to_owned());
            }
        };
        let policy = if env.allow_private_urls {
            log.warn("BRIGHTRUN_ALLOW_PRIVATE_URLS is set: jobs may name http and private addresses; for tests alone");
            Policy::AllowPrivate
        } else {
            Policy::Public
        };
        let dir = env.state_dir.clone().unwrap_or_else(|| {
            let volume = volumes(&env).into_iter().find(|path| path.is_dir());
            volume.unwrap_or(scratch).join(STATE_FOLDER)
        });
        let state = State::open(&dir)
            .map_err(|error| format!("the state directory cannot be used: {error}"))?;
        let holder = Holder::new(worker_id, env.lease);
        let guard = Guard::new(policy);
        Ok(Self {
            env,
            engine,
            supabase,
            guard,
            state,
            holder,
            later: Later::default(),
            exe,
            log,
        })
    }

    /// Where volumes may be mounted.
    pub fn volumes(&self) -> Vec<PathBuf> {
        volumes(&self.env)
    }

    /// Where base models may lie: beside the state too, where they are downloaded to if there is no volume.
    pub fn roots(&self) -> Roots {
        let mut volumes = self.volumes();
        volumes.push(self.state.root().to_owned());
        Roots {
            model_path: self.env.model_path.clone(),
            volumes,
            hub_cache: self.engine.hub_cache.clone(),
        }
    }

    /// The receiver of a job's events. The operator's `Authorization` goes to hosts that the operator named, and to the project's own:
    /// any other is the choice of whoever submitted the job.
    ///
    /// # Errors
    /// An address that jobs may not name.
    pub fn callback(&self, url: &str) -> Result<Callback, CallbackError> {
        let given = |secret: &crate::config::Secret| (!secret.is_empty()).then(|| secret.clone());
        let parsed = self.guard.check(url)?;
        let hosts = self.env.callback_hosts.as_ref();
        let is_named = hosts.is_some_and(|hosts| {
            let host = parsed.host_str().unwrap_or_default();
            hosts.iter().any(|named| named == host)
        });
        let is_own = self
            .supabase
            .as_ref()
            .is_some_and(|project| project.owns(&parsed));
        if hosts.is_some() && !is_named && !is_own {
            return Err(CallbackError::refused(&parsed));
        }
        let secret = given(&self.env.webhook_secret);
        let auth = given(&self.env.callback_auth).filter(|_| is_named || is_own);
        Callback::new(self.guard.clone(), url, secret.as_ref(), auth.as_ref())
    }

    /// Tries what is left of a job again later, not before `asked` is over.
    pub fn put_off(&self, job: &JobDir, asked: Option<Duration>) {
        self.later
            .put_off(&job.id(), &self.env.callback_waits, asked);
    }

    /// Settings that the operator gives every run.
    pub fn defaults(&self) -> Map<String, Value> {
        let device = self
            .env
            .device
            .clone()
            .map(|device| ("device".to_owned(), json!(device)));
        device.into_iter().collect()
    }
}

fn volumes(env: &WorkerEnv) -> Vec<PathBuf> {
    let known = || VOLUMES.map(PathBuf::from).to_vec();
    env.volumes.clone().unwrap_or_else(known)
}

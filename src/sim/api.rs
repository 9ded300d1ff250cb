//! The library's side of [`Sim`]: plain calls for a test or a program that drives it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::{
    Callback, Delivery, Fault, Object, Record, Route, RowEvent, Sim, Status, Violation, clock,
    files, hub, storage,
};

impl Sim {
    /// `http://127.0.0.1:port`, without a slash at its end.
    pub fn url(&self) -> &str {
        &self.shared.base
    }

    /// Base of the client routes: `{url}/v2/{endpoint}`.
    pub fn endpoint_url(&self) -> String {
        format!("{}/v2/{}", self.shared.base, self.shared.settings.endpoint)
    }

    /// Key of the client routes.
    pub fn client_key(&self) -> &str {
        &self.shared.settings.client_key
    }

    /// Environment variables a worker needs, as the platform and the user's endpoint would set them.
    pub fn worker_environment(&self) -> Vec<(&'static str, String)> {
        let (endpoint, settings) = (self.endpoint_url(), &self.shared.settings);
        let gpu = "gpu=NVIDIA+H200";
        vec![
            (
                "RUNPOD_WEBHOOK_GET_JOB",
                format!("{endpoint}/job-take/$ID?{gpu}"),
            ),
            (
                "RUNPOD_WEBHOOK_POST_OUTPUT",
                format!("{endpoint}/job-done/$RUNPOD_POD_ID/$ID?{gpu}"),
            ),
            (
                "RUNPOD_WEBHOOK_POST_STREAM",
                format!("{endpoint}/job-stream/$RUNPOD_POD_ID/$ID?{gpu}"),
            ),
            (
                "RUNPOD_WEBHOOK_PING",
                format!("{endpoint}/ping/$RUNPOD_POD_ID?{gpu}"),
            ),
            (
                "RUNPOD_PING_INTERVAL",
                settings.ping_interval.as_millis().to_string(),
            ),
            ("RUNPOD_AI_API_KEY", settings.worker_key.clone()),
            ("RUNPOD_ENDPOINT_ID", settings.endpoint.clone()),
            ("RUNPOD_POD_ID", "pod1".to_owned()),
            ("HF_ENDPOINT", format!("{}/hub", self.shared.base)),
            ("SUPABASE_URL", self.shared.base.clone()),
            ("SUPABASE_SERVICE_ROLE_KEY", settings.service_key.clone()),
        ]
    }

    /// Queues a job; `body` is what a client posts to `/run`. Its id.
    ///
    /// # Errors
    /// The body is not an object with an `input`.
    pub fn submit(&self, body: Value) -> io::Result<String> {
        let submitted = self
            .shared
            .change(|state| state.platform.submit(body, false));
        submitted.map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))
    }

    /// Queues a job under an id of the caller's own, one that is not in use.
    ///
    /// # Errors
    /// The body is not an object with an `input`.
    pub fn submit_as(&self, id: &str, body: Value) -> io::Result<()> {
        let submitted = self
            .shared
            .change(|state| state.platform.submit_as(id, body));
        submitted.map_err(|reason| io::Error::new(io::ErrorKind::InvalidInput, reason))
    }

    /// Cancels a job as a client would. Its state after, none if it is unknown.
    pub fn cancel(&self, id: &str) -> Option<Status> {
        self.shared.change(|state| state.platform.cancel(id))
    }

    /// Queues a job that is in progress again, without telling its worker: the next taker is a second one.
    pub fn requeue(&self, id: &str) -> bool {
        self.shared.change(|state| state.platform.requeue(id))
    }

    /// Sends a worker a stop message for any id, known or not.
    pub fn push_stop(&self, worker: &str, id: &str) {
        self.shared
            .change(|state| state.platform.push_stop(worker, id));
    }

    /// State of a job; none if it is unknown, expired or forgotten.
    pub fn status(&self, id: &str) -> Option<Status> {
        self.shared.lock().platform.status(id)
    }

    /// The document `/status/{id}` shows.
    pub fn document(&self, id: &str) -> Option<Value> {
        self.shared.lock().platform.document(id)
    }

    /// Every hand-out of a job, oldest first.
    pub fn deliveries(&self, id: &str) -> Vec<Delivery> {
        self.shared.lock().platform.deliveries(id)
    }

    /// Whether the result of a job asked for a fresh worker (`"stopPod": true`).
    pub fn stop_pod(&self, id: &str) -> bool {
        self.shared.lock().platform.stop_pod(id)
    }

    /// Number of pings of a worker.
    pub fn pings(&self, worker: &str) -> u64 {
        self.shared.lock().platform.pings(worker)
    }

    /// What a worker's pings said is wrong with it, as `check: reason`.
    pub fn unhealthy(&self, worker: &str) -> Vec<String> {
        self.shared.lock().platform.unhealthy(worker)
    }

    /// The rules of the protocol that were broken so far.
    pub fn violations(&self) -> Vec<Violation> {
        self.shared.lock().platform.violations()
    }

    /// Every request so far, in order of arrival.
    pub fn records(&self) -> Vec<Record> {
        self.shared.lock().records.clone()
    }

    /// Number of requests so far, of one route.
    pub fn count(&self, route: Route) -> usize {
        self.shared
            .lock()
            .records
            .iter()
            .filter(|record| record.route == route)
            .count()
    }

    /// One request, counted from 0 in order of arrival.
    pub fn record(&self, index: usize) -> Option<Record> {
        self.shared.lock().records.get(index).cloned()
    }

    /// Requests from the `from`-th on, counted from 0; for a reader that follows.
    pub fn records_from(&self, from: usize) -> Vec<Record> {
        self.shared
            .lock()
            .records
            .get(from..)
            .unwrap_or_default()
            .to_vec()
    }

    /// Adds a fault; it counts requests from now on.
    pub fn add_fault(&self, fault: Fault) {
        self.shared.change(|state| state.faults.add(fault));
    }

    /// Removes all faults.
    pub fn clear_faults(&self) {
        self.shared.change(|state| state.faults.clear());
    }

    /// The rows of a table, oldest first.
    pub fn rows(&self, table: &str) -> Vec<Value> {
        self.shared.lock().rows.all(table)
    }

    /// The row of this `id`; none if there is none.
    pub fn row(&self, table: &str, id: &str) -> Option<Value> {
        self.rows(table).into_iter().find(|row| row["id"] == id)
    }

    /// Inserts a row, defaults and a `user_id` filled in. The whole row.
    ///
    /// # Errors
    /// Table or column is unknown, or a value does not fit; the database's message.
    pub fn insert_row(&self, table: &str, row: &Value) -> io::Result<Value> {
        self.shared
            .change(|state| state.rows.seed(table, row))
            .map_err(io::Error::other)
    }

    /// Updates rows as the application would; `filter` is a query such as `id=eq.x`. Number of rows.
    ///
    /// # Errors
    /// Table, column or filter is unknown, or a value does not fit; the database's message.
    pub fn update_rows(&self, table: &str, filter: &str, fields: &Value) -> io::Result<usize> {
        self.shared
            .change(|state| state.rows.edit(table, filter, fields))
            .map_err(io::Error::other)
    }

    /// Every update of a row: what the database's webhook would have posted.
    pub fn row_events(&self) -> Vec<RowEvent> {
        self.shared.lock().rows.events.clone()
    }

    /// How often the application would have deployed an adapter: updates of a job's row after which it is `completed`,
    /// has an `adapter_file_path` and a `user_id`.
    pub fn deploys(&self) -> usize {
        let deploys = |event: &&RowEvent| {
            event.table == "pipeline_training_jobs"
                && event.new["status"] == "completed"
                && event.new["adapter_file_path"]
                    .as_str()
                    .is_some_and(|path| !path.is_empty())
                && !event.new["user_id"].is_null()
        };
        self.shared
            .lock()
            .rows
            .events
            .iter()
            .filter(deploys)
            .count()
    }

    /// The stored objects, by bucket and path.
    pub fn objects(&self) -> Vec<Object> {
        self.shared.lock().storage.objects()
    }

    /// One stored object.
    pub fn object(&self, bucket: &str, path: &str) -> Option<Object> {
        self.objects()
            .into_iter()
            .find(|object| object.bucket == bucket && object.path == path)
    }

    /// Stores an object without any request, for a dataset that must be there.
    ///
    /// # Errors
    /// The bucket is unknown, or the disk refuses.
    pub fn put_object(&self, bucket: &str, path: &str, bytes: &[u8]) -> io::Result<()> {
        storage::put(&self.shared, bucket, path, bytes)
    }

    /// A signed link to a stored object, good for `lifetime`.
    ///
    /// # Errors
    /// There is no such object.
    pub fn sign_object(&self, bucket: &str, path: &str, lifetime: Duration) -> io::Result<String> {
        if self.object(bucket, path).is_none() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no object `{bucket}/{path}`"),
            ));
        }
        Ok(format!(
            "{}/storage/v1{}",
            self.shared.base,
            storage::signed_path(&self.shared, bucket, path, lifetime)
        ))
    }

    /// Writes a file that `/files/{name}` serves. Its path.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
        let path = self.shared.files_dir.join(name);
        if let Some(folder) = path.parent() {
            fs_err::create_dir_all(folder)?;
        }
        fs_err::write(&path, bytes)?;
        Ok(path)
    }

    /// The plain link to a file.
    pub fn file_url(&self, name: &str) -> String {
        format!("{}/files/{name}", self.shared.base)
    }

    /// A signed link to a file, good for `lifetime`, in whole seconds; zero is expired.
    pub fn signed_file_url(&self, name: &str, lifetime: Duration) -> String {
        let expires = (clock::since_epoch() + lifetime).as_secs();
        let token = files::token(&self.shared.settings.service_key, name, expires);
        format!(
            "{}/files/{name}?token={token}&expires={expires}",
            self.shared.base
        )
    }

    /// Puts the files of `dir`, as they are now, into the hub as model `id`, `organisation/name`. With a `token`, who has another
    /// one gets none of them.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn add_model(&self, id: &str, dir: &Path, token: Option<&str>) -> io::Result<()> {
        let repository = hub::Repository::new(dir, token)?;
        self.shared
            .change(|state| state.hub.insert(id.to_owned(), repository));
        Ok(())
    }

    /// The link callbacks of this name are posted to.
    pub fn callback_url(&self, name: &str) -> String {
        format!("{}/callback/{name}", self.shared.base)
    }

    /// The callbacks of a name, oldest first.
    pub fn callbacks(&self, name: &str) -> Vec<Callback> {
        self.shared
            .lock()
            .callbacks
            .posted
            .get(name)
            .cloned()
            .unwrap_or_default()
    }

    /// Answers to the next callbacks of a name, in order; after them 200 `{}` again.
    pub fn script_callbacks(&self, name: &str, replies: impl IntoIterator<Item = (u16, Value)>) {
        let replies: Vec<(u16, Value)> = replies.into_iter().collect();
        self.shared.change(|state| {
            state
                .callbacks
                .script
                .entry(name.to_owned())
                .or_default()
                .extend(replies);
        });
    }
}

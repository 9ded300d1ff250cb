//! `/hub`: a model hub. A listing, files at a commit, large ones from another origin, some after consent only.
//!
//! | path | what |
//! |---|---|
//! | `/hub/api/models/{organisation}/{name}` | the listing |
//! | `/hub/{organisation}/{name}/resolve/{revision}/{path}` | a file, or the way to it |
//! | `/hub-files/{organisation}/{name}/{path}` | a large file |
//!
//! The other origin is `localhost` instead of `127.0.0.1`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use axum::http::header;
use axum::response::Response;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::content::{self, Content};
use super::server::{Call, empty_reply, json_reply, set};
use crate::hex::hex;

/// Files from this size on lie at the other origin.
const LARGE_BYTES: u64 = 100_000;

/// A repository of the hub.
#[derive(Debug, Clone)]
pub(super) struct Repository {
    /// Commit.
    revision: String,
    files: BTreeMap<String, HubFile>,
    /// Who may have its files; everyone if absent.
    token: Option<String>,
}

#[derive(Debug, Clone)]
struct HubFile {
    path: PathBuf,
    size: u64,
    sha256: String,
}

impl HubFile {
    fn is_large(&self) -> bool {
        self.size >= LARGE_BYTES
    }
}

impl Repository {
    /// The files of `dir`, without those below its folders.
    pub(super) fn new(dir: &Path, token: Option<&str>) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        let mut all = Sha256::new();
        for entry in fs_err::read_dir(dir)? {
            let path = entry?.path();
            let (true, Some(name)) = (path.is_file(), path.file_name()) else {
                continue;
            };
            let bytes = fs_err::read(&path)?;
            all.update(&bytes);
            let (name, size) = (name.to_string_lossy().into_owned(), bytes.len() as u64);
            let sha256 = hex(&Sha256::digest(&bytes));
            files.insert(name, HubFile { path, size, sha256 });
        }
        Ok(Self {
            revision: hex(&all.finalize())[..40].to_owned(),
            files,
            token: token.map(str::to_owned),
        })
    }

    fn listing(&self, id: &str) -> Value {
        let sibling = |(name, file): (&String, &HubFile)| {
            let lfs = json!({"sha256": file.sha256, "size": file.size});
            let mut sibling = json!({"rfilename": name, "size": file.size});
            if file.is_large() {
                sibling["lfs"] = lfs;
            }
            sibling
        };
        let siblings: Vec<Value> = self.files.iter().map(sibling).collect();
        json!({
            "id": id, "sha": self.revision, "gated": self.token.is_some(), "siblings": siblings,
        })
    }
}

/// Answers what begins with `/hub/` or `/hub-files/`.
pub(super) fn answer(call: &Call) -> Response {
    if !matches!(call.method.as_str(), "GET" | "HEAD") {
        return json_reply(405, &json!({"error": "only GET and HEAD"}));
    }
    let parts: Vec<&str> = call.path.splitn(7, '/').skip(1).collect();
    match parts[..] {
        ["hub", "api", "models", organisation, name] => {
            let id = format!("{organisation}/{name}");
            match repository(call, &id) {
                Some(repository) => json_reply(200, &repository.listing(&id)),
                None => unknown(call),
            }
        }
        ["hub", organisation, name, "resolve", revision, path] => {
            resolve(call, &format!("{organisation}/{name}"), revision, path)
        }
        ["hub-files", organisation, name, path] => {
            match repository(call, &format!("{organisation}/{name}")) {
                Some(repository) => serve(call, repository.files.get(path)),
                None => unknown(call),
            }
        }
        _ => json_reply(404, &json!({"error": "no such route"})),
    }
}

fn repository(call: &Call, id: &str) -> Option<Repository> {
    call.shared.lock().hub.get(id).cloned()
}

/// As the hub says it: what there is not, and what is not to be seen, are one to who has no token.
fn unknown(call: &Call) -> Response {
    match call.header("authorization") {
        Some(_) => json_reply(404, &json!({"error": "Repository not found"})),
        None => json_reply(401, &json!({"error": "Invalid username or password."})),
    }
}

fn resolve(call: &Call, id: &str, revision: &str, path: &str) -> Response {
    let Some(repository) = repository(call, id) else {
        return unknown(call);
    };
    let sent = call.header("authorization");
    let sent = sent.and_then(|value| value.strip_prefix("Bearer "));
    if repository.token.is_some() && repository.token.as_deref() != sent {
        let status = if sent.is_some() { 403 } else { 401 };
        let error = format!("Access to model {id} is restricted.");
        return json_reply(status, &json!({"error": error}));
    }
    if revision != repository.revision && revision != "main" {
        return json_reply(404, &json!({"error": "Invalid rev id"}));
    }
    let file = repository.files.get(path);
    if !file.is_some_and(HubFile::is_large) {
        return serve(call, file);
    }
    let origin = call.shared.base.replace("127.0.0.1", "localhost");
    let mut response = empty_reply(302);
    let location = format!("{origin}/hub-files/{id}/{path}");
    set(&mut response, header::LOCATION, &location);
    response
}

fn serve(call: &Call, file: Option<&HubFile>) -> Response {
    let Some(file) = file else {
        return json_reply(404, &json!({"error": "Entry not found"}));
    };
    let content = Content {
        path: &file.path,
        size: file.size,
        etag: format!("\"{}\"", file.sha256),
        mime: "application/octet-stream",
        headers: &call.headers,
        head: call.method == "HEAD",
        action: call.action.as_ref(),
    };
    content::serve(&content)
        .unwrap_or_else(|error| json_reply(500, &json!({"error": error.to_string()})))
}

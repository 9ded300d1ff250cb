//! The project's storage as far as a test needs it: objects, resumable uploads, faults by request number.

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brightrun::worker::secret::Secret;
use brightrun::worker::supabase::{Supabase, Upload};
use serde_json::json;

use crate::serve::{Request, Server, answer};

pub(crate) const PIECE: usize = 6 << 20;

/// What happens to a request instead of, or besides, its work.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// This status, nothing done.
    Refuse(u16),
    /// The connection ends, nothing done.
    Lose,
    /// The connection ends, all done.
    LoseAnswer,
    /// The connection ends, that many bytes of the piece kept.
    Keep(usize),
    /// All uploads under way are forgotten.
    Forget,
    /// `Location` points there.
    SendTo(&'static str),
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) objects: HashMap<String, Vec<u8>>,
    /// Address, object, length, bytes so far.
    pub(crate) uploads: HashMap<String, (String, usize, Vec<u8>)>,
    pub(crate) faults: HashMap<usize, Fault>,
    pub(crate) global_limit: usize,
    number: usize,
    created: usize,
}

pub(crate) struct Store {
    state: Arc<Mutex<State>>,
    pub(crate) server: Server,
}

impl Store {
    pub(crate) fn start(faults: &[(usize, Fault)]) -> Self {
        let state = Arc::new(Mutex::new(State {
            faults: faults.iter().copied().collect(),
            global_limit: 1 << 30,
            ..State::default()
        }));
        let own = state.clone();
        let server =
            Server::start(move |request, stream| own.lock().unwrap().serve(request, stream));
        Self { state, server }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn project(&self) -> Supabase {
        Supabase::new(&self.server.url(""), Secret::new("sb_secret_canary")).unwrap()
    }

    /// Methods of all requests in order, with what they carried.
    pub(crate) fn log(&self) -> Vec<String> {
        let line = |r: &Request| match r.method.as_str() {
            "PATCH" => format!("PATCH {}+{}", r.header("upload-offset"), r.body.len()),
            method => method.to_owned(),
        };
        self.server.requests().iter().map(line).collect()
    }
}

pub(crate) fn upload(file: &std::path::Path) -> Upload {
    Upload {
        bucket: "lora-models".into(),
        path: "adapters/job 1.tar.gz".into(),
        file: file.to_owned(),
        sha256: None,
        content_type: "application/gzip".into(),
        state: Some(file.with_extension("upload.json")),
        deadline: Duration::from_secs(10),
        backoff: Duration::from_millis(5),
    }
}

impl State {
    fn serve(&mut self, request: &Request, stream: &mut TcpStream) {
        let number = self.number;
        self.number += 1;
        let fault = self.faults.get(&number).copied();
        match fault {
            Some(Fault::Refuse(status)) => return answer(stream, status, "", b"refused by plan"),
            Some(Fault::Lose) => return,
            Some(Fault::Forget) => self.uploads.clear(),
            Some(Fault::LoseAnswer | Fault::Keep(_) | Fault::SendTo(_)) | None => {}
        }
        assert_eq!(request.header("apikey"), "sb_secret_canary");
        let kept = match fault {
            Some(Fault::Keep(bytes)) => &request.body[..bytes.min(request.body.len())],
            _ => &request.body[..],
        };
        let (status, mut headers, body) = self.work(request, kept);
        if let Some(Fault::SendTo(place)) = fault {
            headers = format!("Location: {place}\r\n");
        }
        if !matches!(fault, Some(Fault::LoseAnswer | Fault::Keep(_))) {
            answer(stream, status, &headers, &body);
        }
    }

    fn work(&mut self, request: &Request, kept: &[u8]) -> (u16, String, Vec<u8>) {
        let path = request
            .path
            .split('?')
            .next()
            .unwrap()
            .strip_prefix("/storage/v1")
            .unwrap();
        let plain = |status: u16, text: &str| (status, String::new(), text.as_bytes().to_vec());
        if path.starts_with("/upload/resumable") {
            assert_eq!(request.header("tus-resumable"), "1.0.0");
            assert_eq!(request.header("x-upsert"), "true");
        }
        match (request.method.as_str(), path) {
            ("POST", "/upload/resumable") => self.create(request),
            (method, path) if path.starts_with("/upload/resumable/") => {
                let Some((object, length, bytes)) = self.uploads.get_mut(path) else {
                    return plain(404, "The file for this url was not found");
                };
                if method == "DELETE" {
                    self.uploads.remove(path);
                    return plain(204, "");
                }
                if method == "PATCH" {
                    if request.header("upload-offset") != bytes.len().to_string() {
                        return plain(409, "Upload-Offset conflict");
                    }
                    let rest = *length - bytes.len();
                    if request.body.len() != rest.min(PIECE) {
                        return plain(400, "a piece has 6 MiB");
                    }
                    bytes.extend_from_slice(kept);
                    if bytes.len() == *length {
                        self.objects.insert(object.clone(), bytes.clone());
                    }
                }
                let headers = format!(
                    "Upload-Offset: {}\r\nUpload-Length: {length}\r\n",
                    bytes.len()
                );
                (
                    if method == "PATCH" { 204 } else { 200 },
                    headers,
                    Vec::new(),
                )
            }
            (method, path) => self.object(method, path, request),
        }
    }

    fn create(&mut self, request: &Request) -> (u16, String, Vec<u8>) {
        let length: usize = request.header("upload-length").parse().unwrap();
        if length > self.global_limit {
            return (413, String::new(), b"Maximum size exceeded\n".to_vec());
        }
        let decode = |text: &str| String::from_utf8(STANDARD.decode(text).unwrap()).unwrap();
        let metadata: HashMap<&str, String> = request
            .header("upload-metadata")
            .split(',')
            .map(|pair| pair.split_once(' ').unwrap())
            .map(|(name, value)| (name, decode(value)))
            .collect();
        let object = format!("{}/{}", metadata["bucketName"], metadata["objectName"]);
        self.created += 1;
        let address = format!("/upload/resumable/id{}", self.created);
        let location = format!(
            "Location: http://{}/storage/v1{address}\r\n",
            request.header("host")
        );
        self.uploads.insert(address, (object, length, Vec::new()));
        (201, location, Vec::new())
    }

    fn object(&mut self, method: &str, path: &str, request: &Request) -> (u16, String, Vec<u8>) {
        let json = |status: u16, value: serde_json::Value| {
            (status, String::new(), value.to_string().into_bytes())
        };
        if path == "/bucket/lora-models" {
            return json(
                200,
                json!({"id": "lora-models", "file_size_limit": 5_000_000_000_u64, "allowed_mime_types": ["application/gzip"]}),
            );
        }
        let sign = path.strip_prefix("/object/sign/");
        let Some(name) = sign.or_else(|| path.strip_prefix("/object/")) else {
            return json(
                400,
                json!({"statusCode": "404", "code": "NoSuchBucket", "message": "Bucket not found"}),
            );
        };
        let reads = matches!(method, "GET" | "HEAD");
        let name = name
            .strip_prefix("authenticated/")
            .filter(|_| reads)
            .unwrap_or(name);
        let name = name.replace("%20", " ");
        if sign.is_none() && method == "POST" {
            assert_eq!(request.header("x-upsert"), "true");
            self.objects.insert(name, request.body.clone());
            return json(200, json!({"Key": "k", "Id": "i"}));
        }
        let missing = json!({"statusCode": "404", "code": "NoSuchKey", "error": "not_found", "message": "Object not found"});
        match (self.objects.get(&name), sign) {
            (None, _) => json(400, missing),
            (Some(_), Some(_)) => json(
                200,
                json!({"signedURL": format!("/object/sign/{name}?token=canary")}),
            ),
            (Some(_), None) if method == "DELETE" => {
                self.objects.remove(&name);
                json(200, json!({"message": "Successfully deleted"}))
            }
            (Some(bytes), None) => (200, "ETag: \"o\"\r\n".into(), bytes.clone()),
        }
    }
}

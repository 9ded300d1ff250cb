//! The REST routes below `/storage/v1`, resumable uploads apart.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use axum::response::Response;
use serde_json::{Value, json};

use super::objects::{self, Object, Target};
use super::sign::{self, Purpose};
use super::{Refusal, check_keys};
use crate::sim::content::{self, Content};
use crate::sim::server::{Call, json_reply, percent_decoded, set};
use crate::sim::settings::Bucket;
use crate::sim::wire::drain;
use crate::sim::{Shared, clock};

/// Answers a storage request.
pub(in crate::sim) async fn answer(call: Call, mut body: Option<Body>) -> Response {
    let path = call.path.trim_start_matches("/storage/v1/").to_owned();
    let answer = carry_out(&call, &path, &mut body).await;
    // An upload that was refused unread is read now, or its sender would never see the refusal.
    if let Some(body) = body {
        drain(body).await;
    }
    answer.unwrap_or_else(|refusal| refusal.rest())
}

async fn carry_out(call: &Call, path: &str, body: &mut Option<Body>) -> Result<Response, Refusal> {
    let (kind, rest) = path.split_once('/').unwrap_or((path, ""));
    let method = call.method.as_str();
    let is_get = matches!(method, "GET" | "HEAD");
    if kind == "object" {
        if let Some(rest) = rest.strip_prefix("sign/").filter(|_| is_get) {
            return download_signed(call, rest);
        }
        if let Some(rest) = rest
            .strip_prefix("upload/sign/")
            .filter(|_| method == "PUT")
        {
            return upload_signed(call, rest, body).await;
        }
    }
    if let Some(response) = check_keys(call) {
        return Ok(response);
    }
    match (kind, method) {
        ("bucket", "GET") if rest.is_empty() => {
            let buckets = call.shared.settings.buckets.iter().map(bucket_document);
            Ok(json_reply(200, &buckets.collect()))
        }
        ("bucket", "GET") => {
            let bucket = objects::bucket(&call.shared, &percent_decoded(rest))?;
            Ok(json_reply(200, &bucket_document(bucket)))
        }
        ("object", "POST") if rest.starts_with("list/") => list(call, &rest["list/".len()..]),
        ("object", "POST") if rest.starts_with("sign/") => sign(call, &rest["sign/".len()..]),
        ("object", "POST") if rest.starts_with("upload/sign/") => {
            sign_upload(call, &rest["upload/sign/".len()..])
        }
        ("object", "POST" | "PUT") => {
            let upsert = method == "PUT" || call.header("x-upsert") == Some("true");
            upload(call, rest, upsert, body).await
        }
        ("object", "GET" | "HEAD") if rest.starts_with("info/") => {
            let rest = &rest["info/".len()..];
            let object = find(call, rest.strip_prefix("authenticated/").unwrap_or(rest))?;
            Ok(json_reply(200, &info(&object)))
        }
        ("object", "GET" | "HEAD") => {
            let object = find(call, rest.strip_prefix("authenticated/").unwrap_or(rest))?;
            download(call, &object)
        }
        ("object", "DELETE") => delete(call, rest),
        _ => Err(Refusal::new(
            404,
            "InvalidRequest",
            "Not Found",
            format!("Route {method}:/{path} not found"),
        )),
    }
}

/// Bucket and path of `bucket/path`, decoded and both known to be well-formed.
fn place(shared: &Shared, rest: &str) -> Result<(String, String), Refusal> {
    let (bucket, path) = rest
        .split_once('/')
        .ok_or_else(|| Refusal::invalid_key(rest))?;
    let (bucket, path) = (percent_decoded(bucket), percent_decoded(path));
    objects::bucket(shared, &bucket)?;
    objects::check_key(&path)?;
    Ok((bucket, path))
}

fn find(call: &Call, rest: &str) -> Result<Object, Refusal> {
    let (bucket, path) = place(&call.shared, rest)?;
    call.shared
        .lock()
        .storage
        .find(&bucket, &path)
        .cloned()
        .ok_or_else(Refusal::no_key)
}

fn download(call: &Call, object: &Object) -> Result<Response, Refusal> {
    let content = Content {
        path: &object.file,
        size: object.size,
        etag: object.etag(),
        mime: &object.mime,
        headers: &call.headers,
        head: call.method == "HEAD",
        action: call.action.as_ref(),
    };
    let mut response = content::serve(&content).map_err(|error| Refusal::internal(&error))?;
    set(&mut response, header::CACHE_CONTROL, &object.cache_control);
    Ok(response)
}

fn download_signed(call: &Call, rest: &str) -> Result<Response, Refusal> {
    let (bucket, path) = place(&call.shared, rest)?;
    let token = call
        .parameter("token")
        .ok_or_else(|| Refusal::invalid("querystring must have required property 'token'"))?;
    sign::check(&call.shared, &token, &[Purpose::Download], &bucket, &path)?;
    download(call, &find(call, rest)?)
}

/// Stores the body under `rest`.
async fn upload(
    call: &Call,
    rest: &str,
    upsert: bool,
    body: &mut Option<Body>,
) -> Result<Response, Refusal> {
    let shared = &call.shared;
    let (id, path) = place(shared, rest)?;
    let bucket = objects::bucket(shared, &id)?;
    let mime = call
        .header("content-type")
        .unwrap_or("application/octet-stream")
        .to_owned();
    objects::check_mime(bucket, &mime)?;
    let limit = objects::size_limit(shared, bucket);
    let length = call
        .header("content-length")
        .and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit) {
        return Err(Refusal::too_large());
    }
    if !upsert && shared.lock().storage.find(&id, &path).is_some() {
        return Err(Refusal::duplicate());
    }
    let body = body.take().unwrap_or_default();
    let received = objects::receive(shared, body, limit).await?;
    let cache_control = call
        .header("cache-control")
        .unwrap_or("no-cache")
        .to_owned();
    let target = Target {
        bucket: id,
        path,
        mime,
        cache_control,
        upsert,
    };
    let object = objects::commit(shared, target, received)?;
    shared.change(|_| ());
    let key = format!("{}/{}", object.bucket, object.path);
    Ok(json_reply(200, &json!({"Id": object.version, "Key": key})))
}

async fn upload_signed(
    call: &Call,
    rest: &str,
    body: &mut Option<Body>,
) -> Result<Response, Refusal> {
    let (bucket, path) = place(&call.shared, rest)?;
    let token = call.parameter("token").unwrap_or_default();
    let purposes = [true, false].map(|upsert| Purpose::Upload { upsert });
    let purpose = sign::check(&call.shared, &token, &purposes, &bucket, &path)?;
    upload(
        call,
        rest,
        matches!(purpose, Purpose::Upload { upsert: true }),
        body,
    )
    .await
}

fn sign(call: &Call, rest: &str) -> Result<Response, Refusal> {
    let object = find(call, rest)?;
    let seconds = json_body(call)["expiresIn"]
        .as_u64()
        .filter(|seconds| *seconds > 0);
    let seconds =
        seconds.ok_or_else(|| Refusal::invalid("body must have required property 'expiresIn'"))?;
    let link = sign::signed_path(
        &call.shared,
        &object.bucket,
        &object.path,
        Duration::from_secs(seconds),
    );
    Ok(json_reply(200, &json!({"signedURL": link})))
}

fn sign_upload(call: &Call, rest: &str) -> Result<Response, Refusal> {
    let (bucket, path) = place(&call.shared, rest)?;
    let upsert = call.header("x-upsert") == Some("true");
    if !upsert && call.shared.lock().storage.find(&bucket, &path).is_some() {
        return Err(Refusal::duplicate());
    }
    let token = sign::token(
        &call.shared,
        Purpose::Upload { upsert },
        &bucket,
        &path,
        Duration::from_hours(2),
    );
    let url = format!("/object/upload/sign/{bucket}/{path}?token={token}");
    Ok(json_reply(200, &json!({"url": url, "token": token})))
}

/// One object, or with a list of `prefixes` (which are whole paths) many.
fn delete(call: &Call, rest: &str) -> Result<Response, Refusal> {
    if rest.contains('/') {
        let object = find(call, rest)?;
        call.shared
            .change(|state| state.storage.remove(&object.bucket, &object.path));
        return Ok(json_reply(200, &json!({"message": "Successfully deleted"})));
    }
    let bucket = percent_decoded(rest);
    objects::bucket(&call.shared, &bucket)?;
    let body = json_body(call);
    let paths = body["prefixes"]
        .as_array()
        .ok_or_else(|| Refusal::invalid("`prefixes` must be a list"))?;
    let removed: Vec<Object> = call.shared.change(|state| {
        let paths = paths.iter().filter_map(Value::as_str);
        paths
            .filter_map(|path| state.storage.remove(&bucket, path))
            .collect()
    });
    Ok(json_reply(200, &removed.iter().map(info).collect()))
}

/// The entries directly below a prefix; folders have no id.
fn list(call: &Call, bucket: &str) -> Result<Response, Refusal> {
    let bucket = percent_decoded(bucket);
    objects::bucket(&call.shared, &bucket)?;
    let body = json_body(call);
    let prefix = body["prefix"]
        .as_str()
        .unwrap_or_default()
        .trim_end_matches('/');
    let folder = if prefix.is_empty() {
        String::new()
    } else {
        format!("{prefix}/")
    };
    let mut entries = BTreeMap::new();
    for object in call.shared.lock().storage.objects() {
        let Some(rest) = object
            .path
            .strip_prefix(&folder)
            .filter(|_| object.bucket == bucket)
        else {
            continue;
        };
        let entry = match rest.split_once('/') {
            Some((folder, _)) => (folder.to_owned(), folder_entry(folder)),
            None => (rest.to_owned(), entry(rest, &object)),
        };
        entries.insert(entry.0, entry.1);
    }
    let number = |name: &str, default| {
        body[name]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(default)
    };
    let search = body["search"].as_str().unwrap_or_default();
    let found = entries
        .into_iter()
        .filter(|(name, _)| name.contains(search))
        .map(|(_, entry)| entry);
    Ok(json_reply(
        200,
        &found
            .skip(number("offset", 0))
            .take(number("limit", 100))
            .collect(),
    ))
}

fn folder_entry(name: &str) -> Value {
    json!({"name": name, "id": null, "updated_at": null, "created_at": null, "last_accessed_at": null, "metadata": null})
}

fn entry(name: &str, object: &Object) -> Value {
    json!({
        "name": name,
        "id": object.version,
        "updated_at": object.created_at,
        "created_at": object.created_at,
        "last_accessed_at": object.created_at,
        "metadata": {
            "eTag": object.etag(),
            "size": object.size,
            "mimetype": object.mime,
            "cacheControl": object.cache_control,
            "lastModified": object.created_at,
            "contentLength": object.size,
            "httpStatusCode": 200,
        },
    })
}

fn info(object: &Object) -> Value {
    json!({
        "id": object.version,
        "name": object.path,
        "version": object.version,
        "bucket_id": object.bucket,
        "size": object.size,
        "content_type": object.mime,
        "cache_control": object.cache_control,
        "etag": object.etag(),
        "metadata": {},
        "last_modified": object.created_at,
        "created_at": object.created_at,
    })
}

fn bucket_document(bucket: &Bucket) -> Value {
    let created = clock::iso8601(Duration::ZERO);
    json!({
        "id": bucket.id,
        "name": bucket.id,
        "owner": "",
        "public": false,
        "file_size_limit": bucket.file_size_limit,
        "allowed_mime_types": bucket.allowed_mime_types,
        "created_at": created,
        "updated_at": created,
    })
}

fn json_body(call: &Call) -> Value {
    serde_json::from_slice(&call.body).unwrap_or_default()
}

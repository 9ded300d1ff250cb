//! Object storage: whole and resumable uploads, downloads, refusals.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use brightrun::sim::{Action, Bucket, Fault, Route, Settings, Sim};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{Http, Reply, settings};

const OBJECT: &str = "/storage/v1/object/lora-models/adapters/a.tar.gz";

fn start(settings: Settings) -> (Sim, Http) {
    let sim = Sim::start(settings).unwrap();
    let http = Http::new(&sim);
    (sim, http)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Code in the body of a refusal, which must come as HTTP 400.
fn code(reply: &Reply) -> String {
    assert_eq!(reply.status, 400, "{}", reply.text());
    reply.json()["statusCode"].as_str().unwrap().to_owned()
}

#[test]
fn objects_are_stored_described_and_deleted() {
    let (sim, http) = start(settings());
    let put = |upsert: &str| {
        let request = http
            .supabase("POST", OBJECT)
            .header("x-upsert", upsert)
            .header("Content-Type", "application/gzip");
        http.send(request.body("hello"))
    };
    assert_eq!(put("false").json()["Key"], "lora-models/adapters/a.tar.gz");
    assert_eq!(code(&put("false")), "409");
    assert_eq!(put("true").status, 200);
    let object = sim.object("lora-models", "adapters/a.tar.gz").unwrap();
    assert_eq!(
        (object.size, object.sha256, object.mime.as_str()),
        (5, sha256(b"hello"), "application/gzip")
    );
    assert_eq!(std::fs::read(&object.file).unwrap(), b"hello");

    for path in [
        OBJECT.to_owned(),
        OBJECT.replace("object/", "object/authenticated/"),
    ] {
        assert_eq!(http.send(http.supabase("GET", &path)).text(), "hello");
        let head = http.send(http.supabase("HEAD", &path));
        assert_eq!((head.status, head.header("content-length")), (200, "5"));
    }
    let part = http.send(http.supabase("GET", OBJECT).header("Range", "bytes=1-2"));
    assert_eq!(
        (
            part.status,
            part.text().as_str(),
            part.header("content-range")
        ),
        (206, "el", "bytes 1-2/5")
    );
    let info = http
        .send(http.supabase("GET", &OBJECT.replace("object/", "object/info/")))
        .json();
    assert_eq!(
        (&info["size"], &info["name"]),
        (&json!(5), &json!("adapters/a.tar.gz"))
    );
    let list = http.supabase("POST", "/storage/v1/object/list/lora-models");
    let list = http
        .send(list.json(&json!({"prefix": "adapters", "limit": 10})))
        .json();
    assert_eq!(
        (&list[0]["name"], &list[0]["metadata"]["size"]),
        (&json!("a.tar.gz"), &json!(5))
    );
    assert_eq!(http.send(http.supabase("DELETE", OBJECT)).status, 200);
    assert_eq!(code(&http.send(http.supabase("GET", OBJECT))), "404");
    assert_eq!(http.send(http.supabase("HEAD", OBJECT)).status, 400);
}

#[test]
fn refusals_hide_their_code_in_the_body() {
    let bucket = Bucket {
        file_size_limit: Some(10),
        allowed_mime_types: Some(vec!["application/gzip".to_owned(), "text/*".to_owned()]),
        ..Bucket::new("lora-models")
    };
    let (_sim, http) = start(Settings {
        buckets: vec![bucket, Bucket::new("open")],
        file_size_limit: 20,
        ..settings()
    });
    let put = |path: &str, mime: &str, length: usize| {
        let request = http
            .supabase("POST", &format!("/storage/v1/object/{path}"))
            .header("Content-Type", mime);
        http.send(request.body(vec![0; length]))
    };
    assert_eq!(put("lora-models/a", "text/plain", 10).status, 200);
    assert_eq!(code(&put("lora-models/b", "text/plain", 11)), "413");
    assert_eq!(code(&put("lora-models/b", "image/png", 1)), "415");
    assert_eq!(code(&put("open/b", "image/png", 21)), "413");
    assert_eq!(code(&put("nowhere/b", "text/plain", 1)), "404");
    assert_eq!(code(&put("open/%2e%2e/b", "text/plain", 1)), "400");
    assert_eq!(code(&put("open/b%25", "text/plain", 1)), "400");
    let bucket = http
        .send(http.supabase("GET", "/storage/v1/bucket/lora-models"))
        .json();
    assert_eq!(
        (&bucket["file_size_limit"], &bucket["allowed_mime_types"][0]),
        (&json!(10), &json!("application/gzip"))
    );
    let wrong = http
        .request("GET", "/storage/v1/bucket/open")
        .header("apikey", "service-key")
        .bearer_auth("no");
    assert_eq!(code(&http.send(wrong)), "403");
    assert_eq!(
        http.send(http.request("GET", "/storage/v1/bucket/open"))
            .status,
        401
    );
}

#[test]
fn signed_links_need_no_key_until_they_expire() {
    let (sim, http) = start(settings());
    sim.put_object("training-files", "f/training.jsonl", b"{}")
        .unwrap();
    let sign = http.supabase(
        "POST",
        "/storage/v1/object/sign/training-files/f/training.jsonl",
    );
    let link = http.send(sign.json(&json!({"expiresIn": 60}))).json()["signedURL"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        http.send(http.request("GET", &format!("/storage/v1{link}")))
            .text(),
        "{}"
    );
    assert_eq!(
        code(&http.send(http.request("GET", &format!("/storage/v1{link}0")))),
        "400"
    );
    let expired = sim
        .sign_object("training-files", "f/training.jsonl", Duration::ZERO)
        .unwrap();
    let reply = http.send(http.client.get(expired));
    assert_eq!(
        (code(&reply).as_str(), reply.json()["error"].as_str()),
        ("400", Some("InvalidJWT"))
    );
    let absent = http.supabase("POST", "/storage/v1/object/sign/training-files/absent");
    assert_eq!(
        code(&http.send(absent.json(&json!({"expiresIn": 60})))),
        "404"
    );

    let ticket = http
        .send(http.supabase("POST", "/storage/v1/object/upload/sign/lora-models/b"))
        .json();
    let put = format!("/storage/v1{}", ticket["url"].as_str().unwrap());
    assert_eq!(http.send(http.request("PUT", &put).body("x")).status, 200);
    assert_eq!(code(&http.send(http.request("PUT", &put).body("x"))), "409");
}

fn metadata(bucket: &str, path: &str) -> String {
    let pairs = [
        ("bucketName", bucket),
        ("objectName", path),
        ("contentType", "application/gzip"),
    ];
    pairs
        .map(|(name, value)| format!("{name} {}", STANDARD.encode(value)))
        .join(",")
}

fn create(http: &Http, bucket: &str, path: &str, length: u64) -> Reply {
    let request = http
        .supabase("POST", "/storage/v1/upload/resumable")
        .header("Tus-Resumable", "1.0.0");
    let request = request
        .header("Upload-Length", length)
        .header("x-upsert", "false");
    http.send(request.header("Upload-Metadata", metadata(bucket, path)))
}

fn piece(http: &Http, location: &str, offset: usize, bytes: &[u8]) -> reqwest::RequestBuilder {
    http.client
        .patch(location)
        .header("apikey", "service-key")
        .bearer_auth("service-key")
        .header("Tus-Resumable", "1.0.0")
        .header("Upload-Offset", offset)
        .header("Content-Type", "application/offset+octet-stream")
        .body(bytes.to_vec())
}

fn offset(http: &Http, location: &str) -> (u16, String) {
    let request = http
        .client
        .head(location)
        .header("apikey", "service-key")
        .bearer_auth("service-key");
    let reply = http.send(request.header("Tus-Resumable", "1.0.0"));
    (reply.status, reply.header("upload-offset").to_owned())
}

#[test]
fn a_resumable_upload_survives_a_lost_answer_and_a_reset() {
    let (sim, http) = start(Settings {
        tus_chunk: 4096,
        ..settings()
    });
    let bytes: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
    let created = create(&http, "lora-models", "adapters/a.tar.gz", 10_000);
    assert_eq!(created.status, 201);
    let location = created.header("location").to_owned();
    assert!(location.starts_with(sim.url()), "{location}");
    let send =
        |from: usize, to: usize| http.try_send(piece(&http, &location, from, &bytes[from..to]));

    assert_eq!(
        send(0, 1000).unwrap().status,
        400,
        "a short piece that is not the last"
    );
    let first = send(0, 4096).unwrap();
    assert_eq!((first.status, first.header("upload-offset")), (204, "4096"));
    sim.add_fault(Fault::next(Route::Tus, 1, Action::ResetAfter).method("PATCH"));
    assert!(send(4096, 8192).is_err());
    assert_eq!(send(4096, 8192).unwrap().status, 409);
    assert_eq!(offset(&http, &location), (200, "8192".to_owned()));
    sim.clear_faults();
    sim.add_fault(Fault::next(Route::Tus, 1, Action::Reset).method("PATCH"));
    assert!(send(8192, 10_000).is_err());
    assert_eq!(offset(&http, &location), (200, "8192".to_owned()));
    assert_eq!(send(8192, 10_000).unwrap().status, 204);
    let object = sim.object("lora-models", "adapters/a.tar.gz").unwrap();
    assert_eq!((object.size, object.sha256), (10_000, sha256(&bytes)));
    assert_eq!(offset(&http, &location).0, 404);
    let again = create(&http, "lora-models", "adapters/a.tar.gz", 10_000);
    assert_eq!(
        (again.status, again.text().as_str()),
        (409, "The resource already exists")
    );
}

#[test]
fn resumable_refusals_are_true_statuses_in_plain_text() {
    let small = Bucket {
        file_size_limit: Some(100),
        ..Bucket::new("small")
    };
    let buckets = vec![small, Bucket::new("open")];
    let (_sim, http) = start(Settings {
        buckets,
        file_size_limit: 1000,
        tus_lifetime: Duration::from_millis(300),
        ..settings()
    });
    assert_eq!(create(&http, "open", "a", 1001).status, 413);
    assert_eq!(create(&http, "nowhere", "a", 1).status, 404);
    // The bucket's own limit is looked at with the first piece only.
    let late = create(&http, "small", "a", 101);
    assert_eq!(late.status, 201);
    let reply = http.send(piece(&http, late.header("location"), 0, &[0; 101]));
    assert_eq!(
        (reply.status, reply.text().as_str()),
        (413, "Maximum size exceeded")
    );

    let location = create(&http, "open", "a", 10).header("location").to_owned();
    let whole = || piece(&http, &location, 0, &[0; 10]);
    let mut plain = whole().build().unwrap();
    plain.headers_mut().remove("tus-resumable");
    let send = |request| {
        let response = http
            .runtime
            .block_on(async { http.client.execute(request).await });
        response.unwrap().status().as_u16()
    };
    assert_eq!(send(plain), 412);
    let mut octets = whole().build().unwrap();
    octets
        .headers_mut()
        .insert("content-type", "application/octet-stream".parse().unwrap());
    assert_eq!(send(octets), 415);
    let mut keyless = whole().build().unwrap();
    keyless
        .headers_mut()
        .insert("authorization", "Bearer no".parse().unwrap());
    assert_eq!(send(keyless), 403);
    std::thread::sleep(Duration::from_millis(320));
    assert_eq!(http.send(whole()).status, 410);
    let gone = create(&http, "open", "b", 10).header("location").to_owned();
    let delete = http
        .client
        .delete(&gone)
        .header("apikey", "service-key")
        .bearer_auth("service-key");
    assert_eq!(
        http.send(delete.header("Tus-Resumable", "1.0.0")).status,
        204
    );
    assert_eq!(offset(&http, &gone).0, 404);
}

/// A writer that has sent half of the only piece of `location`, ten bytes, and waits.
fn half_written(sim: &Sim, location: &str) -> std::net::TcpStream {
    let path = location.trim_start_matches(sim.url());
    let mut slow = std::net::TcpStream::connect(sim.url().trim_start_matches("http://")).unwrap();
    let head = format!(
        "PATCH {path} HTTP/1.1\r\nHost: sim\r\napikey: service-key\r\n\
         Authorization: Bearer service-key\r\nTus-Resumable: 1.0.0\r\nUpload-Offset: 0\r\n\
         Content-Type: application/offset+octet-stream\r\nContent-Length: 10\r\n\r\n12345"
    );
    slow.write_all(head.as_bytes()).unwrap();
    slow
}

#[test]
fn a_second_writer_finds_the_upload_locked() {
    let (sim, http) = start(settings());
    let location = create(&http, "lora-models", "a", 10)
        .header("location")
        .to_owned();
    let slow = half_written(&sim, &location);
    assert!(sim.wait_until(
        |_| offset(&http, &location).0 == 423,
        Duration::from_secs(2)
    ));
    assert_eq!(http.send(piece(&http, &location, 0, &[0; 10])).status, 423);
    drop(slow);
    let free = |_: &Sim| offset(&http, &location) == (200, "0".to_owned());
    assert!(sim.wait_until(free, Duration::from_secs(2)));
    assert_eq!(http.send(piece(&http, &location, 0, &[0; 10])).status, 204);
}

#[test]
fn an_upload_that_ends_second_does_not_overwrite() {
    let (sim, http) = start(settings());
    let location = create(&http, "lora-models", "a", 10)
        .header("location")
        .to_owned();
    let mut slow = half_written(&sim, &location);
    assert!(sim.wait_until(
        |_| offset(&http, &location).0 == 423,
        Duration::from_secs(2)
    ));
    sim.put_object("lora-models", "a", b"first").unwrap();
    slow.write_all(b"67890").unwrap();
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 409");
    assert_eq!(sim.object("lora-models", "a").unwrap().size, 5);
}

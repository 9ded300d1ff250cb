//! Where requests may go (F13), counted at the socket.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use brightrun::worker::net::fetch::{Limits, Via, fetch};
use brightrun::worker::net::guard::{Lookup, Resolve};
use brightrun::worker::net::{Cancel, Guard, Kind, Policy};
use reqwest::header::HeaderMap;

use crate::serve::{Server, answer};

/// Names with scripted answers: each look-up takes the next, the last stays.
#[derive(Default)]
struct Names {
    answers: Mutex<HashMap<String, Vec<Vec<IpAddr>>>>,
    lookups: AtomicUsize,
}

impl Names {
    fn new(names: &[(&str, &[&[&str]])]) -> Arc<Self> {
        let parse = |ips: &&[&str]| ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let answers = names
            .iter()
            .map(|(name, rounds)| ((*name).to_owned(), rounds.iter().map(parse).collect()));
        Arc::new(Self {
            answers: Mutex::new(answers.collect()),
            lookups: AtomicUsize::new(0),
        })
    }
}

impl Resolve for Names {
    fn resolve<'a>(&'a self, host: &'a str) -> Lookup<'a> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        let mut answers = self.answers.lock().unwrap();
        let found = match answers.get_mut(host.trim_end_matches('.')) {
            Some(rounds) if rounds.len() > 1 => Ok(rounds.remove(0)),
            Some(rounds) => Ok(rounds[0].clone()),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "no such host")),
        };
        Box::pin(std::future::ready(found))
    }
}

fn quick() -> Limits {
    Limits {
        attempts: 1,
        deadline: Duration::from_secs(5),
        ..Limits::default()
    }
}

/// `PORT` stands for the counting listener's port.
const HOSTILE: &[&str] = &[
    // Other schemes.
    "http://files.test/a",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "gopher://127.0.0.1:PORT/_x",
    "ftp://127.0.0.1:PORT/a",
    "ws://127.0.0.1:PORT/",
    "data:text/plain,x",
    "javascript:alert(1)",
    "dict://127.0.0.1:PORT/",
    "ldap://127.0.0.1:PORT/",
    "unix:/run/docker.sock",
    "https:",
    "//127.0.0.1/",
    "127.0.0.1",
    "",
    "https://",
    "HTTPS:///",
    // Ports.
    "https://files.test:22/a",
    "https://files.test:80/a",
    "https://files.test:6379/a",
    "https://files.test:PORT/a",
    // Users.
    "https://user@files.test/a",
    "https://user:pw@files.test/a",
    "https://files.test@127.0.0.1/a",
    "https://:pw@files.test/",
    "https://files.test%40127.0.0.1:PORT/",
    "https://a:b@127.0.0.1:8443/",
    // This machine, in every spelling.
    "https://127.0.0.1/a",
    "https://127.0.0.1:8443/a",
    "https://127.0.0.1:PORT/a",
    "https://127.1/a",
    "https://127.0.1/a",
    "https://2130706433/a",
    "https://0x7f000001/a",
    "https://0x7f.0.0.1/a",
    "https://0177.0.0.1/a",
    "https://017700000001/a",
    "https://127.0.0.1./a",
    "https://%31%32%37.0.0.1/a",
    "https://127\u{3002}0\u{3002}0\u{3002}1/a",
    "https://\u{2460}27.0.0.1/a",
    "https://localhost/a",
    "https://LOCALHOST./a",
    "https://sub.localhost/a",
    "https://0/a",
    "https://0.0.0.0/a",
    "https://[::1]/a",
    "https://[::]/a",
    "https://[0:0:0:0:0:0:0:1]:8443/a",
    "https://127.255.255.254/a",
    // IPv4 inside IPv6.
    "https://[::ffff:127.0.0.1]/a",
    "https://[::ffff:7f00:1]/a",
    "https://[::ffff:169.254.169.254]/a",
    "https://[::127.0.0.1]/a",
    "https://[64:ff9b::7f00:1]/a",
    "https://[64:ff9b::169.254.169.254]/a",
    "https://[64:ff9b:1::a00:1]/a",
    "https://[2002:7f00:1::]/a",
    "https://[2001:0:7f00:1::]/a",
    // Private, link-local, shared, special.
    "https://10.0.0.1/a",
    "https://172.16.0.1/a",
    "https://192.168.0.1/a",
    "https://169.254.169.254/latest/meta-data/",
    "https://2852039166/latest/",
    "https://0xa9fea9fe/",
    "https://100.64.0.1/a",
    "https://100.100.100.200/latest/",
    "https://192.0.0.192/a",
    "https://198.18.0.1/a",
    "https://192.0.2.1/a",
    "https://198.51.100.1/a",
    "https://203.0.113.1/a",
    "https://224.0.0.1/a",
    "https://240.0.0.1/a",
    "https://255.255.255.255/a",
    "https://[fe80::1]/a",
    "https://[fc00::1]/a",
    "https://[fd00:ec2::254]/latest/",
    "https://[ff02::1]/a",
    "https://[2001:db8::1]/a",
    "https://[fec0::1]/a",
    // Names of such addresses.
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://localtest.test/a",
    "https://private.test/a",
    "https://mixed.test/a",
    "https://mapped.test/a",
    "https://nat64.test/a",
    "https://shared.test/a",
    // Tricks of parsers.
    "https://files.test\\@127.0.0.1/a",
    "https:\\\\127.0.0.1\\a",
    "https://127.0.0.1\t/a",
    "https://127.0.0.1\n/a",
    " https://127.0.0.1/a",
    "https://files.test/a b",
    "https://127.0.0.1#@files.test/",
    "https://127.0.0.1?@files.test/",
    "https://127.0.0.1:PORT:443/",
    "https://[::1/",
    "https://files.test/\u{0}",
    "https://[::1%25lo]/",
];

#[tokio::test]
async fn hostile_urls_reach_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    // Where the test may, the port that the rules allow listens too.
    let also = TcpListener::bind("127.0.0.1:8443").ok();
    if let Some(also) = &also {
        also.set_nonblocking(true).unwrap();
    }
    let names = Names::new(&[
        ("files.test", &[&["1.1.1.1"]]),
        ("localhost", &[&["127.0.0.1"]]),
        ("sub.localhost", &[&["::1"]]),
        ("metadata.google.internal", &[&["169.254.169.254"]]),
        ("localtest.test", &[&["127.0.0.1"]]),
        ("private.test", &[&["10.1.2.3"]]),
        ("mixed.test", &[&["1.1.1.1", "127.0.0.1"]]),
        ("mapped.test", &[&["::ffff:127.0.0.1"]]),
        ("nat64.test", &[&["64:ff9b::7f00:1"]]),
        ("shared.test", &[&["100.64.0.9"]]),
    ]);
    let guard = Guard::with_resolver(Policy::Public, names);
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("x");
    assert!(HOSTILE.len() >= 60, "{}", HOSTILE.len());
    for url in HOSTILE {
        let url = url.replace("PORT", &port);
        let (headers, cancel) = (HeaderMap::new(), Cancel::never());
        let got = fetch(
            Via::Guard(&guard),
            &url,
            &headers,
            &to,
            &quick(),
            &cancel,
            &mut |_, _| {},
        )
        .await;
        assert_eq!(got.unwrap_err().kind, Kind::Blocked, "{url:?}");
    }
    for listener in [Some(&listener), also.as_ref()].into_iter().flatten() {
        let connected = listener.accept().map(|(_, from)| from);
        assert_eq!(connected.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}

#[test]
fn ordinary_urls_pass() {
    let guard = Guard::new(Policy::Public);
    for url in [
        "https://abc.supabase.co/storage/v1/object/sign/b/p?token=x",
        "https://files.example:8443/a%20b",
        "https://1.1.1.1/a",
        "https://[2606:4700::1111]/a",
        "https://m\u{fc}ller.example/",
    ] {
        guard.check(url).unwrap();
    }
    let open = Guard::new(Policy::AllowPrivate);
    for url in [
        "http://127.0.0.1:8090/a",
        "http://[::1]:1/",
        "https://10.0.0.1/",
        "http://files.test/",
    ] {
        open.check(url).unwrap();
    }
    for url in [
        "http://169.254.169.254/",
        "http://0.0.0.0/",
        "http://[fe80::1]/",
        "ftp://10.0.0.1/",
        "http://u@10.0.0.1/",
    ] {
        assert_eq!(open.check(url).unwrap_err().kind, Kind::Blocked, "{url}");
    }
}

#[tokio::test]
async fn a_client_for_the_public_net_can_be_made() {
    let guard = Guard::new(Policy::Public);
    let url = guard.check("https://1.1.1.1/").unwrap();
    guard.client_for(&url).await.unwrap();
    let blocked = "https://127.0.0.1/".parse().unwrap();
    assert_eq!(
        guard.client_for(&blocked).await.unwrap_err().kind,
        Kind::Blocked
    );
}

async fn get(guard: &Guard, url: &str, headers: &HeaderMap) -> Result<u16, Kind> {
    let url = guard.check(url).map_err(|error| error.kind)?;
    let got = guard.get(&url, headers, Duration::from_secs(5)).await;
    got.map(|response| response.status().as_u16())
        .map_err(|error| error.kind)
}

#[tokio::test]
async fn redirects_are_checked_again() {
    for target in [
        "http://169.254.169.254/latest/meta-data/",
        "//169.254.169.254/latest",
        "http://[::ffff:169.254.169.254]/",
        "file:///etc/passwd",
        "http://user:pw@127.0.0.1/",
        "http://metadata.test/",
        "http://127.0.0.1:1\\@x/",
        "",
    ] {
        let server = Server::start(move |_, stream| {
            answer(stream, 302, &format!("Location: {target}\r\n"), b"");
        });
        let names = Names::new(&[("metadata.test", &[&["169.254.169.254"]])]);
        let guard = Guard::with_resolver(Policy::AllowPrivate, names);
        let got = get(&guard, &server.url("/a"), &HeaderMap::new()).await;
        assert_eq!(got, Err(Kind::Blocked), "{target}");
        assert!(server.connections() <= 4, "{target}");
    }
}

#[tokio::test]
async fn three_redirects_are_followed_and_no_fourth() {
    let server = Server::start(|request, stream| {
        let number: usize = request.path[1..].parse().unwrap();
        match number {
            0 => answer(stream, 200, "", b"there"),
            _ => answer(stream, 307, &format!("Location: /{}\r\n", number - 1), b""),
        }
    });
    let guard = Guard::new(Policy::AllowPrivate);
    assert_eq!(
        get(&guard, &server.url("/3"), &HeaderMap::new()).await,
        Ok(200)
    );
    assert_eq!(server.requests().len(), 4);
    assert_eq!(
        get(&guard, &server.url("/4"), &HeaderMap::new()).await,
        Err(Kind::Blocked)
    );
    assert_eq!(server.requests().len(), 8);
}

#[tokio::test]
async fn credentials_stay_with_their_origin() {
    let stranger = Server::start(|_, stream| answer(stream, 200, "", b""));
    let away = stranger.url("/b");
    let server = Server::start(move |request, stream| match request.path.as_str() {
        "/near" => answer(stream, 302, "Location: /here\r\n", b""),
        "/far" => answer(stream, 302, &format!("Location: {away}\r\n"), b""),
        _ => answer(stream, 200, "", b""),
    });
    let mut headers = HeaderMap::new();
    headers.insert("authorization", "Bearer canary".parse().unwrap());
    headers.insert("x-token", "canary".parse().unwrap());
    headers.insert("range", "bytes=5-".parse().unwrap());
    let guard = Guard::new(Policy::AllowPrivate);
    for path in ["/near", "/far"] {
        assert_eq!(get(&guard, &server.url(path), &headers).await, Ok(200));
    }
    assert_eq!(
        server.requests()[1].header("authorization"),
        "Bearer canary"
    );
    let seen = &stranger.requests()[0];
    assert!(!format!("{seen:?}").contains("canary"), "{seen:?}");
    assert_eq!(seen.header("range"), "bytes=5-");
}

#[tokio::test]
async fn a_second_answer_of_the_name_server_changes_nothing() {
    let server = Server::start(|_, stream| answer(stream, 200, "", b""));
    let names = Names::new(&[("rebind.test", &[&["127.0.0.1"], &["169.254.169.254"]])]);
    let guard = Guard::with_resolver(Policy::AllowPrivate, names.clone());
    let url = format!("http://rebind.test:{}/a", server.address.port());
    assert_eq!(get(&guard, &url, &HeaderMap::new()).await, Ok(200));
    assert_eq!(
        names.lookups.load(Ordering::SeqCst),
        1,
        "checked and connected with one look-up"
    );
    assert_eq!(
        get(&guard, &url, &HeaderMap::new()).await,
        Err(Kind::Blocked)
    );
    assert_eq!(names.lookups.load(Ordering::SeqCst), 2);
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn an_unknown_host_may_come_back() {
    let guard = Guard::with_resolver(Policy::Public, Names::new(&[("empty.test", &[&[]])]));
    for url in ["https://gone.test/", "https://empty.test/"] {
        assert_eq!(
            get(&guard, url, &HeaderMap::new()).await,
            Err(Kind::Transient),
            "{url}"
        );
    }
}

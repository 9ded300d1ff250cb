//! What RunPod's Python SDK sent, sent again: the simulator answers as the SDK needs it, and has the states that follow.

use std::time::Duration;

use brightrun::http::client_builder;
use brightrun::sim::{Action, Fault, Route, Settings, Sim, Status, ViolationKind};
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::Reply;
use crate::log::{Logged, read};

/// Time passes so much faster than when the logs were made.
const SPEED: f64 = 4.0;

/// Seconds of a log.
fn logged(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds / SPEED)
}

/// What a request has to be answered.
enum Answer {
    /// This status; without a body, if it is 204.
    Status(u16),
    /// 200 and this job.
    Job(&'static str),
    /// 200 and these jobs.
    Batch(&'static [&'static str]),
    /// 200 and the jobs to stop.
    Stops(&'static [&'static str]),
    /// None: the connection is reset.
    Reset,
}

/// Name of the callbacks that a job's webhook is.
const HOOK: &str = "hook";
const NONE: Answer = Answer::Status(204);
const OK: Answer = Answer::Status(200);

/// What happens beside the requests.
enum Event {
    Submit(&'static str),
    Cancel(&'static str),
}

/// The platform of one log. What the recorder answered is not in the logs; what stands here is what the SDK's next step shows.
struct Scene {
    log: &'static str,
    /// Jobs and what a client posted for them, the webhook's address left open; they wait at the start unless an event submits them.
    jobs: Vec<(&'static str, Value)>,
    faults: Vec<Fault>,
    event: Option<(f64, Event)>,
    takes: Vec<Answer>,
    stops: Vec<Answer>,
    posts: Vec<Answer>,
}

/// A scene after its last answer.
struct Played {
    sim: Sim,
    /// The posting's job, and what a client saw of it then.
    seen: Vec<(String, Value)>,
}

impl Scene {
    fn new(log: &'static str, jobs: impl IntoIterator<Item = (&'static str, Value)>) -> Self {
        let jobs = jobs
            .into_iter()
            .map(|(id, input)| (id, json!({"input": input})));
        Self {
            log,
            jobs: jobs.collect(),
            faults: Vec::new(),
            event: None,
            takes: Vec::new(),
            stops: Vec::new(),
            posts: Vec::new(),
        }
    }

    /// Answers the `number`-th request of `route` with `code`.
    fn fault(&mut self, route: Route, number: u64, action: Action) {
        self.faults.push(Fault {
            first: number,
            last: Some(number),
            ..Fault::always(route, action)
        });
    }

    fn start(&mut self) -> Sim {
        let sim = Sim::start(Settings {
            worker_key: "KEY123".to_owned(),
            take_hold: logged(3.0),
            stop_hold: logged(3.0),
            ping_interval: logged(2.0),
            lost_after_pings: 3,
            webhook_retry_wait: logged(1.0),
            faults: self.faults.clone(),
            ..Settings::default()
        });
        let sim = sim.unwrap();
        for (id, body) in &mut self.jobs {
            if body.get("webhook").is_some() {
                body["webhook"] = json!(sim.callback_url(HOOK));
            }
            match &self.event {
                Some((_, Event::Submit(later))) if later == id => {}
                _ => sim.submit_as(id, body.clone()).unwrap(),
            }
        }
        sim
    }

    fn body(&self, id: &str) -> Value {
        let job = self.jobs.iter().find(|(known, _)| *known == id);
        job.unwrap().1.clone()
    }

    fn happen(&self, sim: &Sim) {
        match self.event.as_ref().unwrap().1 {
            Event::Submit(id) => sim.submit_as(id, self.body(id)).unwrap(),
            Event::Cancel(id) => assert_eq!(sim.cancel(id), Some(Status::Cancelled)),
        }
    }

    /// Sends the log's requests in its order and pace. As in the SDK a take waits for the last take, a stop for the last stop, and
    /// what is posted for a job waits for the job.
    async fn play(mut self) -> Played {
        let requests = read(self.log);
        let sim = self.start();
        let client = client_builder().build().unwrap();
        let url = sim.url().to_owned();
        let begun = Instant::now();
        let (mut take, mut stop) = (Polls::new(&self.takes), Polls::new(&self.stops));
        let mut posts = self.posts.iter();
        let mut event = self.event.as_ref().map(|(at, _)| *at);
        let mut seen = Vec::new();
        for request in &requests {
            let at = |seconds: f64| begun + logged(seconds - requests[0].at);
            if let Some(time) = event.take_if(|time| *time < request.at) {
                tokio::time::sleep_until(at(time)).await;
                self.happen(&sim);
            }
            tokio::time::sleep_until(at(request.at)).await;
            let answer = send(&client, &url, request);
            if request.method == "POST" {
                take.end(&self).await;
                self.check(posts.next().unwrap(), answer.await);
                let id = request.target.split(['/', '?']).nth(5).unwrap();
                seen.push((id.to_owned(), sim.document(id).unwrap()));
            } else if request.route() == Route::Take {
                take.begin(&self, answer).await;
            } else if request.route() == Route::Stop {
                stop.begin(&self, answer).await;
            } else {
                self.check(&OK, answer.await);
            }
        }
        take.end(&self).await;
        stop.end(&self).await;
        assert!(posts.next().is_none() && take.is_empty() && stop.is_empty());
        check_records(&sim, &requests);
        Played { sim, seen }
    }

    fn check(&self, expected: &Answer, answer: reqwest::Result<Reply>) {
        if let Answer::Reset = expected {
            assert!(answer.is_err(), "{answer:?}");
            return;
        }
        let answer = answer.unwrap();
        let job = |id: &str| {
            let mut job = json!({"id": id});
            let body = self.body(id);
            job.as_object_mut()
                .unwrap()
                .extend(body.as_object().unwrap().clone());
            job
        };
        let body = match expected {
            Answer::Status(status) => {
                assert_eq!(answer.status, *status, "{answer:?}");
                assert!(*status != 204 || answer.body.is_empty(), "{answer:?}");
                return;
            }
            Answer::Job(id) => job(id),
            Answer::Batch(ids) => ids.iter().map(|id| job(id)).collect(),
            Answer::Stops(ids) => json!({"jobsToStop": ids}),
            Answer::Reset => Value::Null,
        };
        assert_eq!((answer.status, answer.json()), (200, body));
        // The SDK reads an answer only if it says that it is JSON, and how long it is.
        assert!(
            answer
                .header("content-type")
                .starts_with("application/json")
        );
        assert_eq!(
            answer.header("content-length"),
            answer.body.len().to_string()
        );
    }
}

/// The long polls of one kind: one at a time.
struct Polls<'a> {
    expected: std::slice::Iter<'a, Answer>,
    open: Option<JoinHandle<reqwest::Result<Reply>>>,
}

impl<'a> Polls<'a> {
    fn new(expected: &'a [Answer]) -> Self {
        Self {
            expected: expected.iter(),
            open: None,
        }
    }

    async fn begin(
        &mut self,
        scene: &Scene,
        answer: impl Future<Output = reqwest::Result<Reply>> + Send + 'static,
    ) {
        self.end(scene).await;
        self.open = Some(tokio::spawn(answer));
    }

    async fn end(&mut self, scene: &Scene) {
        if let Some(open) = self.open.take() {
            scene.check(self.expected.next().unwrap(), open.await.unwrap());
        }
    }

    fn is_empty(&self) -> bool {
        self.expected.len() == 0
    }
}

/// Sends a request as it was logged.
fn send(
    client: &Client,
    url: &str,
    logged: &Logged,
) -> impl Future<Output = reqwest::Result<Reply>> + Send + 'static + use<> {
    let method = Method::from_bytes(logged.method.as_bytes()).unwrap();
    let mut request = client.request(method, format!("{url}{}", logged.target));
    for (name, value) in logged.headers() {
        request = request.header(name, value);
    }
    if logged.method == "POST" {
        request = request.body(logged.body.clone());
    }
    async {
        let response = request.send().await?;
        Ok(Reply {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.bytes().await?.to_vec(),
        })
    }
}

/// The simulator's own record is the log, but for the order of what came at once.
fn check_records(sim: &Sim, requests: &[Logged]) {
    let records = sim.records();
    for route in [
        Route::Take,
        Route::Stop,
        Route::Progress,
        Route::Done,
        Route::Stream,
        Route::Ping,
    ] {
        let records: Vec<_> = records
            .iter()
            .filter(|record| record.route == route)
            .collect();
        let requests: Vec<_> = requests
            .iter()
            .filter(|request| request.route() == route)
            .collect();
        assert_eq!(records.len(), requests.len());
        for (record, request) in records.iter().zip(requests) {
            assert_eq!(
                (&record.method, &record.target, &record.body),
                (&request.method, &request.target, &request.body)
            );
            for (name, value) in request.headers() {
                assert_eq!(
                    record.header(&name),
                    Some(&*value),
                    "{name} of {}",
                    request.target
                );
            }
        }
    }
}

impl Played {
    /// State, output and error of a job; the error up to the end of what is expected.
    #[track_caller]
    fn ended(&self, id: &str, status: Status, output: &Value, error: Option<&str>) {
        let document = self.sim.document(id).unwrap();
        let given = document["error"].as_str();
        let given = given.map(|given| given.get(..error.unwrap_or("").len()).unwrap_or(given));
        assert_eq!(
            (self.sim.status(id), &document["output"], given),
            (Some(status), output, error)
        );
    }

    /// Exactly these rules were broken, for these jobs.
    #[track_caller]
    fn broke(&self, rules: &[(ViolationKind, &str)]) {
        let mut broken: Vec<(ViolationKind, String)> = Vec::new();
        for violation in self.sim.violations() {
            let rule = (violation.kind, violation.job);
            if !broken.contains(&rule) {
                broken.push(rule);
            }
        }
        let rules = rules.iter().map(|(kind, job)| (*kind, (*job).to_owned()));
        assert_eq!(broken, rules.collect::<Vec<_>>());
    }
}

fn status(code: u16) -> Action {
    Action::Status {
        code,
        body: Value::Null,
        retry_after: None,
        committed: false,
    }
}

#[tokio::test]
async fn a_takes_that_fail_and_six_ends() {
    let inputs = ["x", "progress", "err", "errdict", "raise", "none"];
    let ids = ["j1-u1", "j2", "j3", "j4", "j5", "j6"];
    let mut scene = Scene::new("a", ids.into_iter().zip(inputs.map(|k| json!({"k": k}))));
    let policy = json!({"executionTimeout": 600_000, "ttl": 86_400_000});
    scene.jobs[0].1["policy"] = policy;
    scene.jobs[0].1["webhook"] = Value::Null;
    // After the first answer the SDK rests for 5 s, after the next three not at all.
    for (number, code) in [(1, 429), (2, 400), (3, 500), (4, 204)] {
        scene.fault(Route::Take, number, status(code));
        scene.takes.push(Answer::Status(code));
    }
    scene.takes.extend(ids.map(Answer::Job));
    scene.stops = vec![NONE, NONE, NONE];
    scene.posts = vec![OK, OK, OK, OK, OK, OK, OK];
    let played = scene.play().await;
    let echo = json!({"echo": {"k": "x"}, "job_keys": ["id", "input", "policy", "webhook"]});
    played.ended("j1-u1", Status::Completed, &echo, None);
    assert_eq!(played.sim.callbacks(HOOK).len(), 1);
    let (id, seen) = &played.seen[1];
    assert_eq!(
        (id.as_str(), &seen["status"]),
        ("j2", &json!("IN_PROGRESS"))
    );
    assert_eq!(
        seen["output"],
        json!({"progress": 45.5, "stage": "training"})
    );
    let output = json!({"status": "completed", "\u{e9}": 1});
    played.ended("j2", Status::Completed, &output, None);
    let output = json!({"detail": {"a": 1}});
    played.ended("j3", Status::Failed, &output, Some("bad thing"));
    // With an error that is no text the output is lost.
    played.ended("j4", Status::Completed, &Value::Null, None);
    let error = r#"{"error_type": "<class 'ValueError'>", "error_message": "boom""#;
    played.ended("j5", Status::Failed, &Value::Null, Some(error));
    played.ended("j6", Status::Completed, &Value::Null, None);
    played.broke(&[]);
}

#[tokio::test]
async fn b_a_job_is_stopped() {
    let mut scene = Scene::new("b", ["s1", "s2"].map(|id| (id, json!({}))));
    scene.event = Some((4.3, Event::Cancel("s1")));
    scene.takes = vec![Answer::Job("s1"), Answer::Job("s2")];
    scene.stops = vec![Answer::Stops(&["s1"]), NONE];
    scene.posts = vec![OK];
    let played = scene.play().await;
    // Nothing is posted for a job that is stopped.
    played.ended("s1", Status::Cancelled, &Value::Null, None);
    played.ended("s2", Status::Completed, &json!({"done": 1}), None);
    played.broke(&[]);
}

#[tokio::test]
async fn c_output_comes_in_pieces() {
    let mut scene = Scene::new("c", [("g1", json!({})), ("g2", json!({"k": "generr"}))]);
    scene.takes = vec![Answer::Job("g1"), Answer::Job("g2")];
    scene.stops = vec![NONE];
    scene.posts = vec![OK, OK, OK, OK, OK, OK];
    let played = scene.play().await;
    let steps = json!([{"step": 0}, {"step": 1}]);
    played.ended("g1", Status::Completed, &steps, None);
    let error = "handler: g \ntraceback: Traceback";
    played.ended("g2", Status::Failed, &Value::Null, Some(error));
    let client = client_builder().build().unwrap();
    for id in ["g1", "g2"] {
        let url = format!("{}/stream/{id}", played.sim.endpoint_url());
        let request = client.get(url).bearer_auth(played.sim.client_key());
        let pieces: Value = request.send().await.unwrap().json().await.unwrap();
        let steps = json!([{"output": {"step": 0}}, {"output": {"step": 1}}]);
        assert_eq!(pieces["stream"], steps);
    }
    played.broke(&[]);
}

#[tokio::test]
async fn d_results_are_refused() {
    let ids = ["d1", "d2", "d3", "d4"];
    let mut scene = Scene::new("d", ids.map(|id| (id, json!({}))));
    scene.takes = ids.map(Answer::Job).into_iter().chain([NONE]).collect();
    scene.stops = vec![NONE, NONE, NONE];
    // The SDK tries three times after a 500, once after anything else.
    scene.fault(Route::Done, 1, status(500));
    scene.fault(Route::Done, 2, status(500));
    scene.fault(Route::Done, 4, status(400));
    scene.fault(Route::Done, 5, Action::Reset);
    let error = Answer::Status;
    scene.posts = vec![error(500), error(500), OK, error(400), Answer::Reset, OK];
    let played = scene.play().await;
    let output = json!({"echo": {}, "job_keys": ["id", "input"]});
    for id in ["d1", "d4"] {
        played.ended(id, Status::Completed, &output, None);
    }
    for id in ["d2", "d3"] {
        played.ended(id, Status::InProgress, &Value::Null, None);
    }
    // The SDK's own: it gives up on a result that was refused, and its pings do not list the job any more.
    played.broke(&[
        (ViolationKind::PingWithoutJob, "d2"),
        (ViolationKind::PingWithoutJob, "d3"),
    ]);
}

#[tokio::test]
async fn e_a_batch_is_taken() {
    const IDS: [&str; 3] = ["c1", "c2", "c3"];
    let mut scene = Scene::new("e", IDS.map(|id| (id, json!({}))));
    scene.takes = vec![Answer::Batch(&IDS)];
    // These were answered at once, by a platform without such a channel.
    for number in 1..=3 {
        scene.fault(Route::Stop, number, status(404));
        scene.stops.push(Answer::Status(404));
    }
    scene.posts = vec![OK, OK, OK];
    let played = scene.play().await;
    for id in IDS {
        played.ended(id, Status::Completed, &json!({"done": 1}), None);
    }
    played.broke(&[]);
}

#[tokio::test]
async fn f_a_fresh_worker_is_asked_for() {
    let inputs = [
        ("r1", json!({"k": "refresh"})),
        ("r2", json!({"k": "empty"})),
    ];
    let mut scene = Scene::new("f", inputs);
    scene.takes = vec![Answer::Job("r1"), Answer::Job("r2"), NONE, NONE];
    scene.stops = vec![NONE, NONE];
    scene.posts = vec![OK, OK];
    let played = scene.play().await;
    played.ended("r1", Status::Completed, &json!({"a": 1}), None);
    played.ended("r2", Status::Completed, &Value::Null, None);
    assert!(played.sim.stop_pod("r1") && !played.sim.stop_pod("r2"));
    played.broke(&[]);
}

#[tokio::test]
async fn g_a_job_is_dropped_at_the_end() {
    let mut scene = Scene::new("g", [("late", json!({}))]);
    scene.event = Some((8.4, Event::Submit("late")));
    scene.takes = vec![Answer::Job("late")];
    scene.stops = vec![NONE];
    let played = scene.play().await;
    // The SDK's own: told to end, it drops the job that the open take brings, and says nothing. It is missed when its pings end.
    played.ended("late", Status::InProgress, &Value::Null, None);
    let is_back = |sim: &Sim| sim.status("late") == Some(Status::InQueue);
    assert!(played.sim.wait_until(is_back, Duration::from_secs(10)));
    assert_eq!(played.sim.deliveries("late").len(), 1);
    played.broke(&[]);
}

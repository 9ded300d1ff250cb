//! The commands of the worker: `brightrun worker`, `brightrun preflight`, and the one it starts for each job.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use brightrun::config::{Env, Secret, WorkerEnv, variable_names};
use brightrun::error::{Error, Result};
use brightrun::worker::context::Context;
use brightrun::worker::log::{Level, Log};
use brightrun::worker::net::Cancel;
use brightrun::worker::ping::{self, InProgress};
use brightrun::worker::platform::Platform;
use brightrun::worker::preflight::{self, Verdict, Wishes};
use brightrun::worker::probe::Probe;
use brightrun::worker::queue::{self, End};
use brightrun::worker::{fitness, local};
use serde_json::{Value, json};

use super::console::print;
use super::{ConfigArguments, train_job};

/// Input of a job that is tried once, where there is no queue.
const TEST_INPUT: &str = "test_input.json";

#[derive(Debug, clap::Subcommand)]
pub(super) enum WorkerCommand {
    /// Take jobs from RunPod's queue, or from this machine, and deliver their adapters.
    Worker(WorkerArguments),
    /// Look whether a pod or an endpoint has all that jobs need: mounts, space, GPU, database, storage.
    Preflight(PreflightArguments),
    /// Train as the worker's child: with micro-batches that fit, events as JSON lines on standard output, until standard input
    /// closes.
    #[command(hide = true)]
    TrainJob(ConfigArguments),
}

impl WorkerCommand {
    pub(super) fn run(&self) -> Result<ExitCode> {
        match self {
            Self::Worker(arguments) => run(arguments),
            Self::Preflight(arguments) => check(arguments),
            Self::TrainJob(arguments) => train_job::run(arguments),
        }
    }
}

/// Names as RunPod's own workers have them.
#[derive(Debug, clap::Args)]
pub(super) struct WorkerArguments {
    /// Run this job once, as JSON: `{"input": {...}}`.
    #[arg(long = "test_input", value_name = "JSON")]
    test_input: Option<String>,
    /// Serve /run, /runsync, /status, /cancel and /health on this machine.
    #[arg(long = "rp_serve_api")]
    serve: bool,
    /// Host to serve on.
    #[arg(long = "rp_api_host", default_value = "localhost")]
    host: String,
    /// Port to serve on; 0: any.
    #[arg(long = "rp_api_port", default_value_t = 8000)]
    port: u16,
    /// Accepted and not used: one job runs at a time.
    #[arg(long = "rp_api_concurrency", default_value_t = 1, hide = true)]
    _concurrency: u32,
    /// Record in the state directory how the platform behaves: times and statuses, no values.
    #[arg(long = "rp_probe")]
    probe: bool,
    /// ERROR, WARN, INFO or DEBUG.
    #[arg(long = "rp_log_level", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Accepted and not used.
    #[arg(long = "rp_debugger", hide = true)]
    _debugger: bool,
    /// What other workers know is passed over.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct PreflightArguments {
    /// Hub id of a base model that has to be here.
    #[arg(long, value_name = "ID")]
    model: Option<String>,
    /// Bytes of the largest adapter that has to go into the bucket.
    #[arg(long, value_name = "N")]
    adapter_bytes: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A failure that only a person can mend.
fn bad(origin: &str, reason: impl Into<String>) -> Error {
    Error::Config {
        origin: origin.to_owned(),
        reason: reason.into(),
    }
}

fn context(env: &WorkerEnv, log_level: Option<&str>, worker_id: &str) -> Result<Context> {
    let wanted = log_level.or(env.runpod.log_level.as_deref());
    let level = wanted.and_then(Level::parse).unwrap_or(Level::Info);
    let secrets: Vec<Secret> = [
        &env.supabase_key,
        &env.runpod.key,
        &env.hub_token,
        &env.webhook_secret,
        &env.callback_auth,
    ]
    .map(Clone::clone)
    .into();
    let sink = Arc::new(|line: &str| print(&format!("{line}\n")));
    let log = Log::new(sink, level, env.runpod.endpoint_id.is_some(), &secrets);
    let exe = std::env::current_exe()?;
    let scratch = [PathBuf::from("/scratch"), std::env::temp_dir()];
    let scratch = scratch
        .into_iter()
        .find(|path| path.is_dir())
        .unwrap_or_default();
    Context::new(env.clone(), Env::read(), worker_id, exe, scratch, log)
        .map_err(|reason| bad("environment", reason))
}

/// What the worker writes is for its own user: data sets, addresses with tokens.
fn keep_private() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

fn run(arguments: &WorkerArguments) -> Result<ExitCode> {
    keep_private();
    let env = WorkerEnv::from_process();
    let unnamed = || format!("worker-{}", std::process::id());
    let worker_id = env.runpod.pod_id.clone().unwrap_or_else(unnamed);
    let context = match context(&env, arguments.log_level.as_deref(), &worker_id) {
        Ok(context) => context,
        Err(error) => {
            // Else nobody sees more of it than a worker that ends.
            let reason = error.to_string();
            runtime()?.block_on(ping::unhealthy(&env.runpod, &worker_id, "state", &reason));
            return Err(error);
        }
    };
    context.log.info(&format!(
        "--- Starting Serverless Worker |  Version {}{} ---",
        env!("CARGO_PKG_VERSION"),
        option_env!("BRIGHTRUN_COMMIT").map_or(String::new(), |commit| format!(" ({commit})"))
    ));
    runtime()?.block_on(async {
        let draining = queue::listen(&context)?;
        if arguments.serve {
            let address = address(&arguments.host, arguments.port)?;
            let told =
                |address: SocketAddr| context.log.info(&format!("serving on http://{address}"));
            local::serve(&context, address, &draining, told).await?;
            return Ok(ExitCode::SUCCESS);
        }
        let queue =
            Platform::new(&env.runpod, &worker_id).map_err(|reason| bad("environment", reason))?;
        match (&arguments.test_input, queue) {
            (None, Some(platform)) => {
                let probe = probe(arguments, &context)?;
                let platform = platform.with_probe(probe.clone());
                let counting = tokio::spawn(count_grace(probe.clone(), draining.clone()));
                let code = serve_queue(&context, &platform, &draining).await;
                if draining.is_cancelled() && probe.is_on() {
                    // What comes after SIGTERM is to be seen.
                    let _ = counting.await;
                }
                Ok(code)
            }
            (Some(text), _) => once(&context, text, &draining).await,
            (None, None) if Path::new(TEST_INPUT).is_file() => {
                once(&context, &fs_err::read_to_string(TEST_INPUT)?, &draining).await
            }
            (None, None) => {
                context.log.warn("test_input.json not found, exiting.");
                Ok(ExitCode::FAILURE)
            }
        }
    })
}

fn probe(arguments: &WorkerArguments, context: &Context) -> Result<Probe> {
    if !arguments.probe {
        return Ok(Probe::default());
    }
    Ok(Probe::open(
        context.state.root(),
        &variable_names("RUNPOD_"),
    )?)
}

async fn count_grace(probe: Probe, draining: Cancel) {
    draining.cancelled().await;
    probe.count_grace().await;
}

async fn serve_queue(context: &Context, platform: &Platform, draining: &Cancel) -> ExitCode {
    let env = &context.env.runpod;
    if !env.skip_checks
        && let Err(unfit) = fitness::check(context).await
    {
        context.log.error(&unfit.reason);
        let reason = context.log.redact(&unfit.reason);
        ping::unhealthy(env, &platform.worker_id, unfit.check, &reason).await;
        return ExitCode::FAILURE;
    }
    let jobs = InProgress::default();
    ping::start(env, &platform.worker_id, &jobs, &context.log);
    match queue::run(context, platform, &jobs, draining).await {
        End::Drained => ExitCode::SUCCESS,
        End::Refused => ExitCode::FAILURE,
        End::Broken => {
            let reason = "the device does not work any more";
            ping::unhealthy(env, &platform.worker_id, "gpu", reason).await;
            ExitCode::FAILURE
        }
    }
}

/// Runs one job and prints its answer.
async fn once(context: &Context, text: &str, draining: &Cancel) -> Result<ExitCode> {
    let job: Value = serde_json::from_str(text)
        .map_err(|error| bad("test input", format!("is no JSON: {error}")))?;
    let id = job["id"].as_str().unwrap_or("local_test").to_owned();
    let body = local::one(context, &job, draining).await;
    let body = body.map_err(|reason| bad("test input", reason))?;
    print(&format!("{body:#}\n"));
    let is_good = body.is_object() && body.get("error").is_none();
    if is_good {
        context
            .log
            .info(&format!("Job {id} completed successfully."));
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    if host == "localhost" {
        return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    let found = (host, port)
        .to_socket_addrs()
        .ok()
        .and_then(|mut all| all.next());
    found.ok_or_else(|| {
        bad(
            "--rp_api_host",
            format!("`{host}` is no address of this machine"),
        )
    })
}

fn check(arguments: &PreflightArguments) -> Result<ExitCode> {
    keep_private();
    let env = WorkerEnv::from_process();
    let context = context(&env, Some("ERROR"), "preflight")?;
    let wishes = Wishes {
        model: arguments.model.clone(),
        adapter_bytes: arguments.adapter_bytes,
    };
    let findings = runtime()?.block_on(preflight::check(&context, &wishes));
    let mut is_good = true;
    let mut all = Vec::new();
    for finding in findings {
        let (mark, text) = match finding.verdict {
            Verdict::Good(text) => ("ok", text),
            Verdict::Doubtful(text) => ("look", text),
            Verdict::Bad(text) => {
                is_good = false;
                ("FAIL", text)
            }
        };
        let text = context.log.redact(&text);
        if arguments.json {
            all.push(json!({"check": finding.name, "verdict": mark, "text": text}));
        } else {
            print(&format!("{mark:<6}{:<20}{text}\n", finding.name));
        }
    }
    if arguments.json {
        print(&format!("{:#}\n", json!(all)));
    }
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

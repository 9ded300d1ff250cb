//! The trainer: a process of its own, so that neither a crash nor a lack of memory takes the worker along.
//!
//! It is this binary's `train-job`: events come as JSON lines on its standard output. It stops (with a checkpoint) by SIGTERM
//! or when its standard input closes, and saves a checkpoint by SIGUSR1.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::log::Log;
use super::net::Cancel;
use crate::train::events::Event;

/// Characters that are kept of what the trainer says besides its events.
const LAST_WORDS: usize = 2000;
/// Longest time a run of an earlier worker takes to notice that it is alone.
const PREDECESSOR: Duration = Duration::from_mins(5);

/// Time for a killed process to end.
const KILLED: Duration = Duration::from_secs(30);

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Ending {
    /// The adapter is there.
    Finished {
        /// Its directory.
        adapter: PathBuf,
        /// Steps.
        steps: u64,
        /// Mean loss per target token over the last epoch, in nats.
        final_loss: Option<f64>,
        /// That of the held-out data.
        eval_loss: Option<f64>,
    },
    /// It was asked to stop; there is a checkpoint.
    Stopped {
        /// Steps done.
        completed: u64,
    },
    /// It cannot go on.
    Failed {
        /// As the command line's: 12 does not fit, 17 numeric, 65 data ...
        exit_code: u8,
        /// For a person.
        message: String,
    },
}

/// A line of the trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// How it ended: the last one.
    Ending(Ending),
    /// Something that happened.
    Event(Event),
}

/// A running trainer.
#[derive(Debug)]
pub struct Trainer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    last_words: tokio::task::JoinHandle<String>,
    ended: bool,
}

impl Trainer {
    /// Starts the run of `config`, whose output goes to `output_dir`.
    ///
    /// # Errors
    /// Those of the operating system.
    pub async fn start(
        exe: &Path,
        config: &Path,
        output_dir: &Path,
        log: &Log,
        cancel: &Cancel,
    ) -> std::io::Result<Self> {
        // Cancelled, the trainer is started all the same, to be stopped at once.
        let _ = cancel.or(wait_for_predecessor(output_dir, log)).await;
        let mut child = Command::new(exe)
            .arg("train-job")
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // What holds the run's secrets is the worker alone.
            .env_remove("SUPABASE_SERVICE_ROLE_KEY")
            .env_remove("RUNPOD_AI_API_KEY")
            .env_remove("RUNPOD_API_KEY")
            .env_remove("HF_TOKEN")
            .env_remove("BRIGHTRUN_WEBHOOK_SECRET")
            .env_remove("BRIGHTRUN_CALLBACK_AUTH")
            .kill_on_drop(true)
            .spawn()?;
        let broken = || std::io::Error::other("the trainer has no output");
        let stdout = child.stdout.take().ok_or_else(broken)?;
        let stderr = child.stderr.take().ok_or_else(broken)?;
        let log = log.clone();
        let last_words = tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            let mut last = String::new();
            while let Ok(Some(line)) = lines.next_line().await {
                log.warn(&format!("trainer: {line}"));
                last.push_str(&line);
                last.push('\n');
                if last.len() > 2 * LAST_WORDS {
                    let from = last.len() - LAST_WORDS;
                    let from = (from..last.len()).find(|at| last.is_char_boundary(*at));
                    last.drain(..from.unwrap_or(0));
                }
            }
            last
        });
        Ok(Self {
            child,
            lines: BufReader::new(stdout).lines(),
            last_words,
            ended: false,
        })
    }

    /// The next line; after the last one `None`. A trainer that ends without saying how it ended is told here.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Line> {
        while let Ok(Some(text)) = self.lines.next_line().await {
            if let Ok(line) = serde_json::from_str::<Line>(&text) {
                self.ended |= matches!(line, Line::Ending(_));
                return Some(line);
            }
        }
        if self.ended {
            return None;
        }
        let status = self.child.wait().await.ok();
        let words = tokio::time::timeout(Duration::from_secs(5), &mut self.last_words).await;
        let words = words.ok().and_then(Result::ok).unwrap_or_default();
        // Not before: where this future is dropped at a wait, the next one waits again.
        self.ended = true;
        Some(Line::Ending(died(status, words.trim())))
    }

    /// Asks it to stop after the step it is at, with a checkpoint.
    pub fn stop(&self) {
        self.signal(rustix::process::Signal::TERM);
    }

    /// Asks it to save a checkpoint after the step it is at.
    pub fn save(&self) {
        self.signal(rustix::process::Signal::USR1);
    }

    /// Ends it, and waits until its memory is free; not for ever: a process that hangs in a driver does not end.
    pub async fn kill(&mut self, log: &Log) {
        let killed = tokio::time::timeout(KILLED, self.child.kill()).await;
        if killed.is_err() {
            log.error("the trainer does not end: it hangs in the driver");
        }
    }

    /// Waits until the process is gone.
    pub async fn wait(&mut self) {
        let _ = self.child.wait().await;
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(id, signal);
        }
    }
}

/// What a process that said nothing more died of.
fn died(status: Option<std::process::ExitStatus>, words: &str) -> Ending {
    use std::os::unix::process::ExitStatusExt as _;
    let signal = status.and_then(|status| status.signal());
    let code = status.and_then(|status| status.code());
    let what = match (signal, code) {
        (Some(9), _) => {
            "the trainer was killed (signal 9), most likely because the machine ran out of memory"
                .to_owned()
        }
        (Some(signal), _) => format!("the trainer crashed (signal {signal})"),
        (None, Some(code)) => format!("the trainer ended with exit code {code}"),
        (None, None) => "the trainer is gone".to_owned(),
    };
    let words = match words {
        "" => String::new(),
        words => format!("; its last words: {words}"),
    };
    Ending::Failed {
        exit_code: code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1),
        message: format!("{what}{words}"),
    }
}

/// Where a worker was killed, its trainer ends by itself after the step it is at, and holds the run's lock until then.
async fn wait_for_predecessor(output_dir: &Path, log: &Log) {
    use rustix::fs::{FlockOperation, flock};
    let begun = tokio::time::Instant::now();
    let mut told = false;
    while let Ok(file) = fs_err::File::open(output_dir.join(".lock")) {
        if flock(file.file(), FlockOperation::NonBlockingLockExclusive).is_ok() {
            return;
        }
        if begun.elapsed() > PREDECESSOR {
            return;
        }
        if !told {
            log.info("an earlier trainer of this job is still at its step; waiting for it");
            told = true;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

//! A job's input, as the application and RunPod send it, checked at once.

mod intake;
mod url;

pub use intake::Unknown;
pub use url::{JobUrl, MAX_LEN as MAX_URL_LEN};

use std::fmt;
use std::path::Path;

use serde_json::{Map, Value, json};

use self::intake::Intake;
use crate::config::{TrainConfig, setting_name};
use crate::error::{Error, Result};

/// Targets of an optimizer step where the job names none.
const BATCH_SIZE: usize = 4;
/// Higher rates destroy the model.
const MAX_LEARNING_RATE: f64 = 1e-2;
/// Rates that adapters are trained with.
const USUAL_LEARNING_RATES: std::ops::RangeInclusive<f64> = 1e-5..=1e-3;
/// vLLM's default `max_lora_rank`: it does not load an adapter of a higher one.
const VLLM_MAX_RANK: usize = 16;
/// Unknown keys that are told; more are counted.
const MAX_UNKNOWN_TOLD: usize = 20;
/// Longest part of an id.
const MAX_NAME_LEN: usize = 96;

/// A job that can be tried.
#[derive(Debug, Clone)]
pub struct Job {
    /// `job_id`, else RunPod's id. Safe as a file name.
    pub id: String,
    /// Hub id of the base model, as it was asked for: `name` or `organisation/name`. Safe as a path below a directory.
    pub base_model: String,
    /// Where the data are.
    pub dataset_url: JobUrl,
    /// Where news are sent to besides.
    pub callback_url: Option<JobUrl>,
    /// Targets of an optimizer step.
    pub batch_size: usize,
    /// What the job says of the hardware.
    pub gpu: GpuRequest,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// Keys that mean nothing here; the first ones are among `warnings` too.
    pub unknown: Vec<Unknown>,
    settings: Map<String, Value>,
}

/// What a job says of the hardware. Information only: the application sends labels, not what the worker runs on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GpuRequest {
    /// Name.
    pub kind: Option<String>,
    /// How many.
    pub count: Option<usize>,
    /// Memory of each, in GB.
    pub memory_gb: Option<f64>,
    /// Price of each, an hour.
    pub cost_per_gpu_hour: Option<f64>,
}

/// Why an input is no job: every problem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// One sentence each; no secrets.
    pub problems: Vec<String>,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the job cannot be run: {}", self.problems.join("\n  "))
    }
}

impl std::error::Error for JobError {}

impl From<JobError> for Error {
    fn from(error: JobError) -> Self {
        Self::Config {
            origin: "of the job".to_owned(),
            reason: error.problems.join("\n  "),
        }
    }
}

impl Job {
    /// Reads `input`; `id` is RunPod's id, the job's own where the input has none.
    ///
    /// Each field is known by the names of both contracts. Numbers may be texts. Keys that mean nothing are kept and told.
    ///
    /// # Errors
    /// [`JobError`] with every problem.
    pub fn parse(id: &str, input: &Value) -> Result<Self, JobError> {
        let mut intake = Intake::new(input);
        let own_id = read_id(&mut intake, id);
        let base_model = read_base_model(&mut intake);
        let dataset_url = read_url(&mut intake, "dataset_url");
        if input.is_object() && input.get("dataset_url").is_none_or(Value::is_null) {
            let reason = "`dataset_url` is missing, expected the address of the data";
            intake.problems.push(reason.to_owned());
        }
        let callback_url = read_url(&mut intake, "callback_url");
        let gpu = read_gpu(&mut intake);
        let batch_size = intake.count("batch_size", 1, 64);
        intake.take("batch_size");
        check_ranges(&mut intake);
        check_settings(&mut intake);
        let known = (own_id, base_model, dataset_url);
        let (Some(id), Some(base_model), Some(dataset_url), true) =
            (known.0, known.1, known.2, intake.problems.is_empty())
        else {
            return Err(JobError {
                problems: intake.problems,
            });
        };
        let settings = intake.settings();
        let mut warnings = intake.warnings;
        let told = intake.unknown.iter().take(MAX_UNKNOWN_TOLD);
        warnings.extend(told.map(Unknown::to_string));
        if let Some(more @ 1..) = intake.unknown.len().checked_sub(MAX_UNKNOWN_TOLD) {
            warnings.push(format!("{more} more keys mean nothing here"));
        }
        Ok(Self {
            id,
            base_model,
            dataset_url,
            callback_url,
            batch_size: batch_size.unwrap_or(BATCH_SIZE),
            gpu,
            warnings,
            unknown: intake.unknown,
            settings,
        })
    }

    /// The run: the job's settings over `defaults` (settings of the worker, keys of a config) over the library's own, with the
    /// base in `model_dir` and the data in `dataset`. Adapter and card name the base by the id that was asked for.
    ///
    /// A step has `batch_size` targets, in one pass or, under a `micro_batch_size` from `config` or `defaults`, in passes
    /// of at most so many.
    ///
    /// # Errors
    /// [`Error::Config`] for a default that is none, or a path that is not UTF-8.
    pub fn train_config(
        &self,
        model_dir: &Path,
        dataset: &Path,
        output_dir: &Path,
        defaults: &Map<String, Value>,
    ) -> Result<TrainConfig> {
        let own = |(key, value): (&String, &Value)| (setting_name(key).to_owned(), value.clone());
        let mut entries: Map<String, Value> = defaults.iter().map(own).collect();
        entries.extend(self.settings.clone());
        entries.insert("base_model".to_owned(), text(model_dir)?);
        entries.insert("base_model_id".to_owned(), json!(self.base_model));
        entries.insert("datasets".to_owned(), json!([{"path": text(dataset)?}]));
        entries.insert("output_dir".to_owned(), text(output_dir)?);
        let is_capped = entries.contains_key("micro_batch_size");
        let mut config = TrainConfig::from_entries(entries, "of the job")?;
        let cap = if is_capped {
            config.micro_batch_size
        } else {
            self.batch_size
        };
        let mut divisors = (1..=cap.min(self.batch_size)).rev();
        let largest = divisors.find(|size| self.batch_size.is_multiple_of(*size));
        config.micro_batch_size = largest.unwrap_or(1);
        config.gradient_accumulation_steps = self.batch_size / config.micro_batch_size;
        Ok(config)
    }
}

/// Whether `name` is safe as one component of a path and of an address.
pub(super) fn is_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= MAX_NAME_LEN
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(legal)
}

/// Whether `id` is `name` or `organisation/name`, safe as a path below a directory.
pub(super) fn is_model_id(id: &str) -> bool {
    id.split('/').count() <= 2 && id.split('/').all(is_name) && !id.contains("..")
}

fn read_id(intake: &mut Intake, runpod_id: &str) -> Option<String> {
    let expected = "expected a letter or digit, then up to 95 of letters, digits, `.`, `_` and `-`";
    let was_given = intake.path("job_id").is_some();
    let own = intake.text("job_id");
    if own.is_none() && was_given {
        return None;
    }
    let (path, id) = own.unwrap_or_else(|| ("id".to_owned(), runpod_id.to_owned()));
    if is_name(&id) {
        return Some(id);
    }
    let shown = crate::config::shown(&json!(id));
    intake
        .problems
        .push(format!("`{path}` is {shown}, {expected}"));
    None
}

fn read_base_model(intake: &mut Intake) -> Option<String> {
    let was_given = intake.path("base_model").is_some();
    let Some((path, id)) = intake.text("base_model") else {
        if !was_given {
            let reason = "`hyperparameters.base_model` is missing, expected a hub id such as `organisation/name`";
            intake.problems.push(reason.to_owned());
        }
        return None;
    };
    if is_model_id(&id) {
        return Some(id);
    }
    let shown = crate::config::shown(&json!(id));
    let help = if id.starts_with(['/', '.', '~']) || id.contains('\\') {
        "a path; expected a hub id such as `organisation/name` (where its files lie is the worker's setting MODEL_PATH)"
    } else {
        "expected a hub id, `name` or `organisation/name` of letters, digits, `.`, `_` and `-`"
    };
    intake.problems.push(format!("`{path}` is {shown}, {help}"));
    None
}

fn read_url(intake: &mut Intake, name: &str) -> Option<JobUrl> {
    let (path, text) = intake.text(name)?;
    match JobUrl::parse(&text) {
        Ok(url) => Some(url),
        Err(reason) => {
            intake.problems.push(format!("`{path}` {reason}"));
            None
        }
    }
}

/// What is no more than information keeps no job from running.
fn read_gpu(intake: &mut Intake) -> GpuRequest {
    let problems = std::mem::take(&mut intake.problems);
    let positive = |value: f64| value > 0.0;
    let gpu = GpuRequest {
        kind: intake.text("gpu_type").map(|(_, text)| text),
        count: intake.count("gpu_count", 1, 8),
        memory_gb: intake.number("gpu_memory_gb", "a number above 0", positive),
        cost_per_gpu_hour: intake.number("cost_per_gpu_hour", "a number of at least 0", |value| {
            value >= 0.0
        }),
    };
    for name in ["gpu_count", "gpu_memory_gb", "cost_per_gpu_hour"] {
        intake.take(name);
    }
    let told = std::mem::replace(&mut intake.problems, problems);
    intake.warnings.extend(told);
    if let Some(count @ 2..) = gpu.count {
        let warning = format!("the job asks for {count} GPUs; a run uses one");
        intake.warnings.push(warning);
    }
    gpu
}

/// Ranges that are narrower than a config's.
fn check_ranges(intake: &mut Intake) {
    let expected = format!("a number above 0 and at most {MAX_LEARNING_RATE}");
    let rate = intake.number("learning_rate", &expected, |value| {
        value > 0.0 && value <= MAX_LEARNING_RATE
    });
    if let Some(rate) = rate.filter(|rate| !USUAL_LEARNING_RATES.contains(rate)) {
        let (least, most) = (USUAL_LEARNING_RATES.start(), USUAL_LEARNING_RATES.end());
        let warning = format!("learning rate {rate:e} is outside the usual {least:e} to {most:e}");
        intake.warnings.push(warning);
    }
    intake.count("num_epochs", 1, 20);
    if let Some(rank) = intake
        .count("lora_r", 1, 256)
        .filter(|rank| *rank > VLLM_MAX_RANK)
    {
        let warning = format!(
            "rank {rank} is above {VLLM_MAX_RANK}, vLLM's default; serve the adapter with `--max-lora-rank {rank}` (on RunPod \
             `MAX_LORA_RANK`)"
        );
        intake.warnings.push(warning);
    }
    intake.number("lora_alpha", "a number above 0", |value| value > 0.0);
    intake.number("lora_dropout", "at least 0 and below 1", |value| {
        (0.0..1.0).contains(&value)
    });
}

/// Has the settings read as a config's are.
fn check_settings(intake: &mut Intake) {
    let mut entries = intake.settings();
    entries.insert("base_model".to_owned(), json!("of/the-job"));
    entries.insert("datasets".to_owned(), json!([{"path": "of the job"}]));
    let Err(Error::Config { reason, .. }) = TrainConfig::from_entries(entries, "") else {
        return;
    };
    for line in reason.split("\n  ") {
        // The key that the message begins with, as the job spells it.
        let name = line.split('`').nth(1).unwrap_or_default();
        let problem = match intake.path(name) {
            Some(path) if path != name => format!("`{path}`: {line}"),
            _ => line.to_owned(),
        };
        intake.problems.push(problem);
    }
}

fn text(path: &Path) -> Result<Value> {
    path.to_str().map(Value::from).ok_or_else(|| Error::Config {
        origin: "of the job".to_owned(),
        reason: format!("path {} is not UTF-8", path.display()),
    })
}

//! `brightrun preflight`: what a pod or an endpoint lacks, in words, before a job finds out.

use super::context::Context;
use super::deliver::CONTENT_TYPES;
use super::fitness;
use super::gpu::Gpu;
use super::identity;
use super::model;
use super::room::{self, NoRoom};
use super::wanted::free_bytes;

/// What a check came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Good(String),
    /// Jobs run, but an operator should know.
    Doubtful(String),
    /// Jobs would fail.
    Bad(String),
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// What it came to.
    pub verdict: Verdict,
}

/// What to look for.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Hub id of a base model that has to be here.
    pub model: Option<String>,
    /// Bytes of the adapter that has to go into the bucket.
    pub adapter_bytes: Option<u64>,
}

/// Looks at everything a job needs.
pub async fn check(context: &Context, wishes: &Wishes) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut find = |name, verdict| all.push(Finding { name, verdict });
    find("mounts", mounts(context));
    find("GPU", gpu(context));
    let fit = fitness::check(context).await;
    find(
        "state and kernels",
        match fit {
            Ok(()) => Verdict::Good(format!(
                "{} can be written, kernels run",
                context.state.root().display()
            )),
            Err(unfit) => Verdict::Bad(unfit.reason),
        },
    );
    find("queue", queue(context));
    if let Some(id) = &wishes.model {
        find("base model", base_model(context, id));
    }
    find("database", database(context).await);
    find("storage", storage(context, wishes).await);
    all
}

fn mounts(context: &Context) -> Verdict {
    let volumes = context.volumes();
    let told: Vec<String> = volumes
        .iter()
        .map(|path| match (path.is_dir(), free_bytes(path)) {
            (true, Ok(free)) => format!("{} ({:.1} GB free)", path.display(), free as f64 / 1e9),
            (true, Err(error)) => format!("{} ({error})", path.display()),
            (false, _) => format!("{} is not there", path.display()),
        })
        .collect();
    let any = volumes.iter().any(|path| path.is_dir());
    let told = told.join(", ");
    if any {
        return Verdict::Good(told);
    }
    Verdict::Doubtful(format!(
        "no volume: {told}; models are downloaded anew by each worker and unfinished jobs do not outlive it. Attach a network volume"
    ))
}

fn gpu(context: &Context) -> Verdict {
    match Gpu::open().describe() {
        Some(text) => Verdict::Good(text),
        None if context.env.device.as_deref() == Some("cuda") => {
            let text = "the driver cannot be asked (NVML is not there), and BRIGHTRUN_DEVICE=cuda wants a GPU";
            Verdict::Bad(text.to_owned())
        }
        None => Verdict::Doubtful("no GPU that a driver knows: training is on the CPU".to_owned()),
    }
}

fn queue(context: &Context) -> Verdict {
    let runpod = &context.env.runpod;
    match (&runpod.get_job, &runpod.post_output, &runpod.ping) {
        (None, ..) => Verdict::Doubtful(
            "RUNPOD_WEBHOOK_GET_JOB is not set: jobs come from this machine alone".to_owned(),
        ),
        (Some(_), Some(_), Some(_)) if runpod.key.is_empty() => Verdict::Bad(
            "RUNPOD_AI_API_KEY is empty: the platform answers as if there were no work".to_owned(),
        ),
        (Some(_), Some(_), Some(_)) => Verdict::Good("RunPod's variables are there".to_owned()),
        _ => {
            Verdict::Bad("RUNPOD_WEBHOOK_POST_OUTPUT or RUNPOD_WEBHOOK_PING is not set".to_owned())
        }
    }
}

fn base_model(context: &Context, id: &str) -> Verdict {
    match model::resolve(id, &context.roots()) {
        Ok(found) => match identity::check(id, &found.dir) {
            Ok(_) => Verdict::Good(format!(
                "{} ({:.1} GB in {} files, whole)",
                found.dir.display(),
                found.num_bytes as f64 / 1e9,
                found.num_files
            )),
            Err(error) => Verdict::Bad(error.to_string()),
        },
        Err(error) if context.env.allow_download => {
            Verdict::Doubtful(format!("would be downloaded by the first job: {error}"))
        }
        Err(error) => Verdict::Bad(error.to_string()),
    }
}

async fn database(context: &Context) -> Verdict {
    let Some(supabase) = &context.supabase else {
        return Verdict::Doubtful(
            "SUPABASE_URL is not set: adapters stay on this machine".to_owned(),
        );
    };
    let nobody = ("id", "eq.00000000-0000-0000-0000-000000000000");
    match supabase
        .get("pipeline_training_jobs", &[nobody], "id,status")
        .await
    {
        Ok(_) => Verdict::Good("`pipeline_training_jobs` can be read".to_owned()),
        Err(error) => Verdict::Bad(error.to_string()),
    }
}

async fn storage(context: &Context, wishes: &Wishes) -> Verdict {
    let Some(supabase) = &context.supabase else {
        return Verdict::Doubtful("there is none".to_owned());
    };
    let bucket = &context.env.bucket;
    let size = wishes.adapter_bytes.unwrap_or(200_000_000);
    match room::ask(supabase, bucket, size, &CONTENT_TYPES).await {
        Ok(()) => Verdict::Good(format!("bucket `{bucket}` takes files of {size} bytes")),
        Err(NoRoom::Refused(reason) | NoRoom::Unknown(reason)) => Verdict::Bad(reason),
    }
}

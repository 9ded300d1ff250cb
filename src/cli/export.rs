//! `brightrun export`.

use std::process::ExitCode;

use brightrun::config::model::ModelConfig;
use brightrun::config::{Env, TrainConfig};
use brightrun::data::calendar::Date;
use brightrun::data::tokenizer::Tokenizer;
use brightrun::durable::Durable;
use brightrun::error::{Error, Result};
use brightrun::export::adapter::{self, Context, Summary};
use brightrun::export::{Adapter, PeftVersion, merged};
use brightrun::model::adapter::{AdapterLayout, AdapterSettings};
use brightrun::model::weights::adapter_layout;
use brightrun::store::locate::locate;
use brightrun::train::checkpoint::{self, Checkpoints, Loaded};
use brightrun::train::summary_of;

use super::console::print;
use super::{ExportArguments, Format};

pub(super) fn run(arguments: &ExportArguments) -> Result<ExitCode> {
    let config = arguments.config.load()?;
    let env = Env::read();
    let model_dir = locate(&config.base_model, &env)?;
    let model = ModelConfig::from_file(model_dir.join("config.json"))?;
    let layout = adapter_layout(&model, AdapterSettings::new(&config))?;
    let (values, summary, source) = trained_values(arguments, &config, &layout)?;
    let template = match &config.chat_template {
        None => None,
        Some(path) => {
            let template = Tokenizer::open(&model_dir)?.chat_template(Some(path), Date::today())?;
            Some(template.source().to_owned())
        }
    };
    let trained = Adapter {
        layout: &layout,
        values: &values,
    };
    let name = match arguments.format {
        Format::Peft => "adapter",
        Format::Peft5 => "adapter-peft5",
        Format::Merged => "merged",
    };
    let output = arguments
        .output
        .clone()
        .unwrap_or_else(|| config.output_dir.join(name));
    let context = Context {
        config: &config,
        model_dir: &model_dir,
        chat_template: template.as_deref(),
        summary,
    };
    let files = Durable::new(env.kill_at_write);
    let write = |version| adapter::write(&files, &output, &trained, &context, version);
    match arguments.format {
        Format::Peft => write(PeftVersion::Transformers4)?,
        Format::Peft5 => write(PeftVersion::Transformers5)?,
        Format::Merged => {
            merged::write(&files, &output, &model_dir, &trained, template.as_deref())?;
        }
    }
    print(&format!("wrote {} from {source}\n", output.display()));
    Ok(ExitCode::SUCCESS)
}

/// The newest checkpoint's values, in full precision; else those of the adapter directory.
fn trained_values(
    arguments: &ExportArguments,
    config: &TrainConfig,
    layout: &AdapterLayout,
) -> Result<(Vec<f32>, Summary, String)> {
    let found = match &arguments.checkpoint {
        Some(path) => Some(checkpoint::read(path)?),
        None => {
            Checkpoints::new(&config.output_dir, config.save_total_limit)
                .newest()
                .0
        }
    };
    if let Some(loaded) = found {
        check_layout(&loaded, layout)?;
        let source = loaded.path.display().to_string();
        return Ok((
            loaded.values().to_vec(),
            summary_of(&loaded.state, None),
            source,
        ));
    }
    let dir = config.output_dir.join("adapter");
    if !dir.join(adapter::WEIGHTS).is_file() {
        let what = "trained adapter (run `brightrun train` first)".to_owned();
        let tried = vec![config.output_dir.join("checkpoints"), dir];
        return Err(Error::Missing { what, tried });
    }
    let mut values = vec![0.0; layout.len()];
    adapter::read(&dir, layout, &mut values)?;
    Ok((values, Summary::default(), dir.display().to_string()))
}

fn check_layout(loaded: &Loaded, layout: &AdapterLayout) -> Result<()> {
    if loaded.state.layout_digest == layout.digest() {
        return Ok(());
    }
    Err(Error::Config {
        origin: loaded.path.display().to_string(),
        reason: "is of a run with another adapter or base model than the config says".to_owned(),
    })
}
